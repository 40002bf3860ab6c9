"""An exported agent acts as the PyTorch agent does, and needs neither PyTorch nor this package."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from stand_ins import DISCOUNT, random_model

from tdmpc2 import commands
from tdmpc2 import export as export_module
from tdmpc2.agent import TDMPC2, Kind, SpeculativeAgent
from tdmpc2.commands.export import random_observations
from tdmpc2.config import TEACHER, CorrectorConfig, PlannerConfig, SpeculationConfig
from tdmpc2.corrector import BaseCorrector, build_corrector, save_corrector
from tdmpc2.errors import ConfigError
from tdmpc2.export import Exported, Graph, Port, check_out, export, record, step_graph
from tdmpc2.world_model import WorldModel, fingerprint, load_world_model, save_world_model

PIXELS = Path(__file__).parent / "fixtures/official/rgb_small.pt"
BUDGET = PlannerConfig(horizon=2, iterations=2, num_samples=24, num_elites=6, num_pi_trajs=4)
MODE = SpeculationConfig(execution_horizon=5)  # two steps are past the planning horizon, and more
RARELY = 0.45  # less than the usual logit of the end of an episode
# What `run.py` may not import.
WITHOUT = "import sys; sys.modules |= dict.fromkeys(['torch', 'tdmpc2', 'onnx'])\n"


@pytest.fixture
def without_onnx(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch in the place of ONNX Runtime: exporting a graph takes tens of seconds."""
    made: dict[str, Graph] = {}

    class Session:
        def __init__(self, path: str, *_: object, **__: object):
            self.graph = made[Path(path).name]

        def run(self, _: None, feed: dict[str, np.ndarray]) -> list[np.ndarray]:
            given = (torch.from_numpy(feed[port.name]) for port in self.graph.inputs)
            with torch.no_grad():
                return [value.numpy() for value in self.graph.run(*given)]

    def write(graph: Graph, path: Path) -> None:
        made[path.name] = graph
        path.touch()

    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    monkeypatch.setattr(export_module, "_write", write)


def corrector_for(model: WorldModel, architecture: str) -> BaseCorrector:
    """A corrector that changes actions; an untrained one does not."""
    c = model.config
    corrector = build_corrector(
        CorrectorConfig(c.latent_dim, c.action_dim, architecture, width=32, window=3, num_heads=2)
    )
    torch.nn.init.normal_(corrector.gate.weight)
    return corrector.eval().requires_grad_(False)


def mode_that_falls_back(
    model: WorldModel, mode: SpeculationConfig, make: Callable[[SpeculationConfig], SpeculativeAgent]
) -> SpeculationConfig:
    """`mode` with thresholds that about a third of the steps exceed."""
    agent, mismatches = make(mode), []

    def act(obs: np.ndarray) -> np.ndarray:
        action = agent.act(obs)
        mismatches.append(agent.info.mismatch.item())
        return action

    random_observations(model.config)(0, 30, act)
    return replace(mode, threshold=(float(np.nanquantile(mismatches, 0.7)),))


def hardest() -> SpeculativeAgent:
    """Episodic and multi-task, five Q heads, a history, refining two steps ahead, fallbacks."""
    model = random_model("both")
    # Samples that end at once are equally good, and rounding decides between them: few should.
    model.termination_head[-1].bias.sub_(RARELY)
    corrector = corrector_for(model, "temporal")

    def make(mode: SpeculationConfig) -> SpeculativeAgent:
        return SpeculativeAgent(TDMPC2(model, BUDGET, discount=DISCOUNT, task=2), mode, corrector)

    return make(mode_that_falls_back(model, replace(MODE, refine_steps=2, corrector="temporal"), make))


@pytest.fixture(scope="module")
def of_hardest(tmp_path_factory: pytest.TempPathFactory) -> tuple[SpeculativeAgent, Path, Exported]:
    agent, folder = hardest(), tmp_path_factory.mktemp("exported") / "it's a folder"
    return agent, folder, export(agent, folder, random_observations(agent.teacher.model.config), task="t")


def test_it_acts_as_the_agent(of_hardest) -> None:
    agent, folder, done = of_hardest
    assert done.difference <= 1e-4
    manifest = json.loads((folder / "manifest.json").read_text())
    assert sorted(path.name for path in folder.iterdir()) == [
        *("check.npz", "iteration.onnx", "manifest.json", "prior.onnx", "run.py", "step.onnx")
    ]
    assert {name: (folder / name).stat().st_size for name in manifest["bytes"]} == manifest["bytes"]
    assert manifest["weights"] == fingerprint(agent.teacher.model)
    assert manifest["action"]["size"] == 2, "two of three entries are of the task"
    assert all(port["meaning"] for g in manifest["graphs"].values() for port in g["inputs"] + g["outputs"])
    assert [port["name"] for port in manifest["graphs"]["step.onnx"]["inputs"] if "initial" in port] == [
        *("z_pred", "k", "plan", "history", "history_valid")
    ]


def test_the_recorded_steps_hold_every_kind(of_hardest) -> None:
    agent, folder, _ = of_hardest
    kinds, steps_in_plan = set(), set()
    observe = random_observations(agent.teacher.model.config)

    def seeing(seed: int, steps: int, act: Callable[[np.ndarray], np.ndarray]) -> None:
        def seen(obs: np.ndarray) -> np.ndarray:
            action = act(obs)
            kinds.add(agent.info.kinds[0])
            steps_in_plan.add(agent.info.k.item())
            return action

        observe(seed, steps, seen)

    again = record(agent, seeing, 60, 0)
    with np.load(folder / "check.npz") as file:
        assert all((file[name] == again[name]).all() for name in file.files), "the same seed, the same file"
        assert file["begins"].sum() == 2 and file["planned"].sum() == len(file["noise"])
    assert kinds == {Kind.PLANNED, Kind.CORRECTED, Kind.FALLBACK}
    assert max(steps_in_plan) >= BUDGET.horizon


def test_nan_is_no_agreement(of_hardest, tmp_path: Path) -> None:
    _, folder, _ = of_hardest
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    with np.load(folder / "check.npz") as file:
        recorded = {name: file[name] for name in file.files}
    recorded["action"][5] = np.nan
    np.savez(copy / "check.npz", **recorded)
    assert np.isnan(export_module.imported(copy / "run.py").check(copy))


def test_its_program_needs_no_pytorch(of_hardest, tmp_path: Path) -> None:
    agent, folder, _ = of_hardest
    run = f"{WITHOUT}import runpy; sys.argv = {['run.py']!r}; runpy.run_path('run.py', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", run], cwd=folder, capture_output=True, text=True, check=True)
    difference = float(done.stdout.split("agent: ")[1].split(",")[0])
    assert difference <= 1e-4 and "2 threads: a step that makes a plan takes" in done.stdout
    obs = np.random.default_rng(0).normal(size=(4, *agent.teacher.model.config.obs_shape))
    np.save(tmp_path / "obs.npy", obs)
    run = f"{WITHOUT}import runpy; sys.argv = ['run.py', 'obs.npy']\n"
    run += f"runpy.run_path({str(folder / 'run.py')!r}, run_name='__main__')"
    subprocess.run([sys.executable, "-c", run], cwd=tmp_path, check=True, capture_output=True)
    actions = np.load(tmp_path / "actions.npy")
    assert actions.shape == (4, 2) and (np.abs(actions) <= 1).all()


def test_a_wrong_observation_changes_nothing(of_hardest) -> None:
    _, folder, _ = of_hardest
    program = export_module.imported(folder / "run.py")
    obs = np.zeros(5, np.float32)
    one, other = program.Agent(folder, seed=3), program.Agent(folder, seed=3)
    for wrong in (np.full(5, np.nan), np.zeros(4)):
        with pytest.raises(ValueError, match="the observation"):
            one.act(wrong)
    for _ in range(7):
        assert (one.act(obs) == other.act(obs)).all()
    assert one.info == other.info


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys, without_onnx: None) -> None:
    """On an accelerated agent without samples of the prior; its task has no environment here."""
    model = random_model("plain")
    corrector = corrector_for(model, "two_tower")
    planner = replace(BUDGET, num_pi_trajs=0)
    agent, out = tmp_path / "agent", tmp_path / "out"
    mode = replace(MODE, corrector="two_tower", threshold=(1.5,))
    saved = dict(planner=asdict(planner), speculation=asdict(mode), discount=DISCOUNT)
    save_world_model(agent, model, task="my-robot", precision="bfloat16", **saved)
    save_corrector(agent / "correctors/two_tower", corrector, fingerprint(model))
    tdmpc2(monkeypatch, "export", str(agent), f"out={out}", "steps=24")
    printed = capsys.readouterr()
    assert "random observations are recorded" in printed.err
    assert f"{out / 'check.npz'}: 0." in printed.out and "24 recorded steps with" in printed.out
    names = {path.name for path in out.iterdir()}
    assert names == {"check.npz", "iteration.onnx", "manifest.json", "run.py", "step.onnx"}
    before = (out / "check.npz").read_bytes()
    for arguments, line in (
        ([], "holds an exported agent; give overwrite=true or another folder"),
        (["steps=1"], "steps=1: must be at least 3"),
    ):
        with pytest.raises(SystemExit):
            tdmpc2(monkeypatch, "export", str(agent), f"out={out}", *arguments)
        error = capsys.readouterr().err
        assert line in error and error.count("\n") == 1
    assert (out / "check.npz").read_bytes() == before
    tdmpc2(monkeypatch, "export", str(agent), f"out={out}", "steps=24", "overwrite=true")
    assert {path.name for path in tmp_path.iterdir()} == {"agent", "out"}, "nothing temporary is left"


def tdmpc2(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["tdmpc2", *arguments])
    commands.main()


def test_pixels_and_two_towers(tmp_path: Path) -> None:
    model = load_world_model(PIXELS)
    corrector = corrector_for(model, "two_tower")
    graph = step_graph(
        SpeculativeAgent(TDMPC2(model, BUDGET), replace(MODE, corrector="two_tower"), corrector)
    )
    export_module._write(graph, tmp_path / "step.onnx")
    generator = torch.Generator().manual_seed(0)
    given = {port.name: port.value for port in graph.inputs}
    given["obs"] = torch.randint(0, 256, model.config.obs_shape, generator=generator, dtype=torch.uint8)
    given["plan"], given["new_plan"] = given["plan"] - 0.5, given["plan"] + 0.25
    session = onnxruntime.InferenceSession(tmp_path / "step.onnx")
    for new, k in ((True, 5), (False, 1), (False, 3)):
        given["new"], given["k"] = torch.tensor(new), torch.tensor(k, dtype=torch.int32)
        found = session.run(None, {name: value.numpy() for name, value in given.items()})
        for value, expected in zip(found, graph.run(*given.values()), strict=True):
            np.testing.assert_allclose(value, expected, atol=1e-5)


@pytest.mark.parametrize("mode", [TEACHER, replace(TEACHER, plan_length=0, corrector="distilled")])
def test_a_teacher_and_a_policy_that_never_plans(
    mode: SpeculationConfig, tmp_path: Path, without_onnx: None
) -> None:
    model = random_model("plain")
    corrector = corrector_for(model, mode.corrector) if mode.corrector else None
    agent = SpeculativeAgent(TDMPC2(model, BUDGET, discount=DISCOUNT), mode, corrector)
    done = export(agent, tmp_path / "out", random_observations(model.config), task=None, steps=9)
    assert done.difference <= 1e-6
    assert done.plans == (9 if mode == TEACHER else 0)
    assert ("iteration.onnx" in done.sizes) == ("prior.onnx" in done.sizes) == (mode == TEACHER)


def test_packages_that_are_missing(monkeypatch, tmp_path: Path, capsys) -> None:
    monkeypatch.setattr(export_module, "PACKAGES", ("onnx", "onnx_of_tomorrow"))
    with pytest.raises(SystemExit):
        tdmpc2(monkeypatch, "export", str(tmp_path), f"out={tmp_path / 'out'}")
    assert (
        "exporting needs onnx_of_tomorrow: `pip install 'speculative-tdmpc2[export]'`"
        in capsys.readouterr().err
    )


def test_a_foreign_folder_is_not_replaced(tmp_path: Path) -> None:
    check_out(tmp_path, overwrite=False)
    check_out(tmp_path / "new", overwrite=False)
    (tmp_path / "manifest.json").write_text('["of a browser extension"]')
    with pytest.raises(ConfigError, match="is no exported agent; choose another folder"):
        check_out(tmp_path, overwrite=True)
    with pytest.raises(ConfigError, match="is no exported agent"):
        check_out(tmp_path / "manifest.json", overwrite=True)


def test_what_onnx_cannot_hold(tmp_path: Path, monkeypatch) -> None:
    """The folder is written whole or not at all."""

    def unknown_to_onnx(x: torch.Tensor) -> tuple[torch.Tensor]:
        return (torch.linalg.eigvals(x).real,)

    graph = Graph(unknown_to_onnx, [Port("x", "a matrix", torch.eye(2))], {"y": "its eigenvalues"})
    monkeypatch.setattr(export_module, "_graphs", lambda agent: {"step.onnx": graph})
    with pytest.raises(
        ConfigError, match=r"step.onnx cannot be made .*its teacher alone may still be exported"
    ):
        export(hardest(), tmp_path / "out", lambda *_: None, task=None)
    assert not any(tmp_path.iterdir())


def test_an_agent_that_acts_differently_is_not_written(tmp_path: Path, monkeypatch) -> None:
    model = random_model("plain")
    agent = SpeculativeAgent(TDMPC2(model, BUDGET, discount=DISCOUNT), TEACHER)
    program = type("Program", (), {"check": staticmethod(lambda folder: 0.5)})
    monkeypatch.setattr(export_module, "_write", lambda graph, path: path.touch())
    monkeypatch.setattr(export_module, "imported", lambda path: program)
    with pytest.raises(ConfigError, match=r"acts differently, by 5.0e-01"):
        export(agent, tmp_path / "out", random_observations(model.config), task=None, steps=3)
    assert not any(tmp_path.iterdir())
