"""Step by step from a checkpoint to an agent that `load_agent` opens: every script once, on tiny settings."""

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import tdmpc2
from tdmpc2 import cli
from tdmpc2.accelerate import AccelerateConfig, accelerate, save_agent
from tdmpc2.agent import Kind
from tdmpc2.commands import collect, compare, distill, evaluate
from tdmpc2.config import EAGER, BudgetOverride, SpeculationConfig
from tdmpc2.corrector import build_corrector, load_corrector, save_corrector
from tdmpc2.distillation.dataset import read_shard
from tdmpc2.errors import ConfigError
from tdmpc2.evaluation import evaluate as evaluation
from tdmpc2.evaluation import runs
from tdmpc2.files import in_use, read_json
from tdmpc2.progress import SILENT
from tdmpc2.teacher import open_teacher
from tdmpc2.world_model import fingerprint

TEACHER = str(Path(__file__).parent / "fixtures/official/state_small.pt")
TASK = "task=step_by_step_task:StepByStep-v0"
BUDGET = (
    *("planner.num_samples=16", "planner.iterations=2", "planner.num_elites=4", "planner.num_pi_trajs=4"),
    "planner.compile=false",
)
TEACHING = (TASK, f"checkpoint={TEACHER}", *BUDGET)
SMALL = (
    *("evaluation.episodes=2", "evaluation.calibration_episodes=2", "evaluation.latency_steps=3"),
    *("evaluation.label_episodes=0", "evaluation.num_envs=2", "workers=1"),
)
TRAINING = (
    *("distillation.updates=2", "distillation.batch_size=4", "distillation.rollout_steps=4"),
    *("distillation.validate_every=1", "distillation.width=32", "distillation.window=3"),
)
MODE = "two_tower_3"
ENVIRONMENT = '''
import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box


class StepByStep(gym.Env):
    """Six steps; the reward is 1 + the first action; the state moves with the actions."""

    observation_space = Box(-np.inf, np.inf, (24,), np.float32)
    action_space = Box(-1.0, 1.0, (6,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.state = self.np_random.normal(size=24).astype(np.float32)
        return self.state.copy(), {}

    def step(self, action):
        self.state[:6] += 0.1 * action
        return self.state.copy(), 1.0 + float(action[0]), False, False, {}


gym.register("StepByStep-v0", entry_point=StepByStep, max_episode_steps=6)
'''
Run = Callable[..., str]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds what the scripts leave."""
    folder = tmp_path_factory.mktemp("user")
    (folder / "step_by_step_task.py").write_text(ENVIRONMENT)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(folder)
        choose_at_once(patch)
        start(patch, collect, *TEACHING, "episodes=3", "num_envs=2", "workers=1", "out=data/teacher")
        train = [f"checkpoint={TEACHER}", "data=data", "out=correctors", *TRAINING]
        start(patch, distill, *train, "distillation.architecture=two_tower")
        more = ["corrector=correctors/two_tower", "execution_horizon=3", "seed=3", "episodes=3", "num_envs=3"]
        start(patch, collect, *TEACHING, *more, "workers=1", "out=data/round")
        start(patch, distill, *train, "distillation.architecture=two_tower", "distillation.loss=mse")
        start(patch, compare, *TEACHING, "correctors=correctors", "out=agent", *SMALL)
    return folder


def choose_at_once(patch: pytest.MonkeyPatch) -> None:
    """Choose `MODE` whatever the episodes show; the report and exact latencies are tested elsewhere."""
    patch.setattr(evaluation, "choose", lambda *_: evaluation.Choice(MODE, "it is tested"))
    patch.setattr(runs, "measure_latency", partial(runs.measure_latency, warm_up=0))
    patch.setattr(evaluation, "write_report", lambda out, *_: out / "report.html")


def start(patch: pytest.MonkeyPatch, script: Any, *arguments: str) -> None:
    """Run a script as its command line would."""
    patch.setattr(sys, "argv", ["tdmpc2 x", *arguments])
    cli.run(script.Settings, script.main)


@pytest.fixture
def run(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a script in the folder, and return what it printed; a mistake's line where it failed."""
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv("COLUMNS", "200")
    choose_at_once(monkeypatch)

    def run(script: Any, *arguments: str, fails: bool = False) -> str:
        capsys.readouterr()
        if not fails:
            start(monkeypatch, script, *arguments)
            return capsys.readouterr().out
        with pytest.raises(SystemExit):
            start(monkeypatch, script, *arguments)
        (line,) = capsys.readouterr().err.splitlines()
        return line

    return run


def test_the_corrector_drove_the_second_collection(folder: Path) -> None:
    tensors, header = read_shard(folder / "data/round/shard-00000003.safetensors")
    behaviour = SpeculationConfig(execution_horizon=3, corrector="two_tower")
    (described,) = header["behaviours"]
    assert {name: described[name] for name in vars(behaviour)} == vars(behaviour)
    assert header["seeds"] == [3, 4, 5]
    assert torch.equal(tensors["action"][0], tensors["plan"][0, 0]), "a plan's first action, of its mean"
    assert not torch.equal(tensors["action"], tensors["drawn"])


def test_what_was_chosen_is_an_agent(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = read_json(folder / "agent/evaluation/chosen.json")
    assert chosen["mode"] == MODE
    monkeypatch.chdir("/")  # it needs nothing but its folder
    agent = tdmpc2.load_agent(folder / "agent", compute=EAGER)
    assert isinstance(agent, tdmpc2.SpeculativeAgent)
    assert agent.config == SpeculationConfig(**chosen["speculation"])
    assert agent.config.corrector == "two_tower" and agent.config.execution_horizon == 3
    trained = load_corrector(folder / "correctors/two_tower", fingerprint(agent.teacher.model))
    assert agent.corrector is not None and fingerprint(agent.corrector) == fingerprint(trained)
    assert agent.teacher.planner.config.num_samples == 16
    agent.reset()
    kinds = []
    for obs in np.random.default_rng(0).normal(size=(2, 24)).astype(np.float32):
        agent.act(obs)
        assert agent.info is not None
        kinds.append(agent.info.kind.item())
    assert kinds[0] == Kind.PLANNED and kinds[1] in (Kind.CORRECTED, Kind.FALLBACK)


def test_an_agent_and_its_teacher_are_evaluated_by_the_same_script(folder: Path, run: Run) -> None:
    tables = {}
    for name, checkpoint, mode in (("agent", "agent", MODE), ("teacher", TEACHER, "baseline")):
        arguments = [TASK, f"checkpoint={checkpoint}", *BUDGET, "episodes=2", f"out=returns/{name}"]
        printed = run(evaluate, *arguments)
        assert f"mode: {mode} (" in printed
        tables[name] = pd.read_csv(folder / "returns" / name / "episodes.csv")
        about = read_json(folder / "returns" / name / "evaluation.json")
        assert about["mode"] == mode and about["mean"] == pytest.approx(tables[name]["return"].mean())
        calls = tables[name]["planner_calls"].sum() / tables[name]["length"].sum()
        assert about["planner_calls"] == pytest.approx(calls) and f"{calls:.1%}" in printed
    assert about["speculation"] == vars(SpeculationConfig(execution_horizon=1))
    assert list(tables["agent"]) == list(tables["teacher"])
    assert list(tables["agent"]["seed"]) == list(tables["teacher"]["seed"]) == [1000, 1001]
    assert (tables["teacher"]["planner_calls"] == 6).all()
    assert (tables["agent"]["planner_calls"] < 6).any(), "it acts in its mode"
    assert (tables["agent"]["return"] != tables["teacher"]["return"]).all()


def test_evaluating_again_goes_on_and_leaves_the_same_agent(folder: Path, run: Run) -> None:
    files = ("model.safetensors", "correctors/two_tower/corrector.safetensors", "evaluation/episodes.csv")
    before = [(folder / "agent" / name).read_bytes() for name in files]
    run(compare, *TEACHING, "correctors=agent/correctors", "out=agent", *SMALL)
    assert [(folder / "agent" / name).read_bytes() for name in files] == before
    other = ("correctors=correctors", "out=agent", *SMALL, "evaluation.quantile=0.5")
    refused = run(compare, *TEACHING, *other, fails=True)
    assert "was written with evaluation.quantile=0.9, not 0.5: choose another out=" in refused


def test_the_folder_of_correctors_is_said(run: Run) -> None:
    evaluating = [*TEACHING, *SMALL, "out=nothing"]
    line = run(compare, *evaluating, "correctors=correctors/two_tower", fails=True)
    assert "correctors/two_tower is no folder of correctors: give correctors" in line
    line = run(compare, *evaluating, "correctors=agent", fails=True)
    assert "give agent/correctors" in line
    line = run(compare, *evaluating, "correctors=data", fails=True)
    assert "train one with `tdmpc2 distill`" in line
    collecting = [*TEACHING, "out=nothing", "episodes=1"]
    line = run(collect, *collecting, "corrector=correctors", fails=True)
    assert "give one of correctors/two_tower" in line
    line = run(collect, *collecting, "corrector=correctors/two_tower", fails=True)
    assert "execution_horizon=1: this mode corrects no step" in line


def test_a_teacher_is_not_overwritten(folder: Path, run: Run) -> None:
    tdmpc2.world_model.save_world_model(folder / "own", tdmpc2.load_world_model(TEACHER))
    before = (folder / "own/config.json").read_bytes()
    arguments = [TASK, "checkpoint=own", *BUDGET, *SMALL, "correctors=correctors", "out=./own"]
    assert "teacher's own folder" in run(compare, *arguments, fails=True)
    with pytest.raises(ConfigError, match="teacher's own folder"):
        accelerate(AccelerateConfig(task=TASK.split("=")[1], checkpoint="own", out="./own"), SILENT)
    tdmpc2.world_model.save_world_model(folder / "another", tdmpc2.load_world_model(TEACHER))
    assert "holds another checkpoint" in run(compare, *arguments[:-1], "out=another", fails=True)
    with pytest.raises(ConfigError, match="holds another checkpoint"):
        accelerate(AccelerateConfig(task=TASK.split("=")[1], checkpoint="own", out="another"), SILENT)
    for name in ("own", "another"):
        assert (folder / name / "config.json").read_bytes() == before


def test_a_corrector_that_was_trained_again_meanwhile_is_noticed(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(folder)
    teacher = open_teacher("step_by_step_task:StepByStep-v0", TEACHER, BudgetOverride(compile=False))
    trained = load_corrector(folder / "correctors/two_tower", None)
    save_corrector(tmp_path / "changed/two_tower", build_corrector(trained.config), teacher.fingerprint)
    evaluated = folder / "agent/evaluation"
    with pytest.raises(ConfigError, match="two_tower was trained again while it was evaluated"):
        save_agent(tmp_path / "agent", teacher, evaluated, tmp_path / "changed")
    assert not (tmp_path / "agent").exists()
    save_agent(tmp_path / "agent", teacher, evaluated, folder / "correctors")
    assert isinstance(tdmpc2.load_agent(tmp_path / "agent", compute=EAGER), tdmpc2.SpeculativeAgent)


@pytest.mark.parametrize(
    ("script", "arguments", "busy"),
    [
        (collect, (*TEACHING, "out=data/teacher"), "data/teacher"),
        (distill, (f"checkpoint={TEACHER}", "data=data", "out=correctors", *TRAINING), "correctors"),
        (compare, (*TEACHING, *SMALL, "correctors=correctors", "out=agent"), "agent"),
        (evaluate, (*TEACHING, "episodes=1", "out=returned"), "returned"),
    ],
)
def test_the_second_in_a_folder_leaves_it(
    folder: Path, run: Run, script: Any, arguments: tuple[str, ...], busy: str
) -> None:
    with in_use(folder / busy):
        line = run(script, *arguments, fails=True)
    assert f"{busy} is in use by another process" in line


def test_agents_of_earlier_versions_name_no_mode(folder: Path, run: Run, tmp_path: Path) -> None:
    config = read_json(folder / "agent/config.json")
    del config["mode"]
    for name in ("model.safetensors", "correctors"):
        (tmp_path / name).symlink_to(folder / "agent" / name)
    (tmp_path / "config.json").write_text(json.dumps(config))
    printed = run(evaluate, TASK, f"checkpoint={tmp_path}", *BUDGET, "episodes=1")
    assert "mode: speculative (3 steps a plan, corrector two_tower)" in printed
