"""The whole main job on a short task of a user's own, with a tiny teacher; and what ends it."""

import io
import json
import shutil
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from omegaconf import OmegaConf
from stand_ins import ENVIRONMENT, nested

import tdmpc2
from research import experiments, write_results
from tdmpc2 import commands
from tdmpc2.accelerate import AccelerateConfig
from tdmpc2.accelerate import accelerate as run_job
from tdmpc2.agent import TDMPC2, Kind
from tdmpc2.checked import from_json
from tdmpc2.config import EAGER, BudgetOverride, SpeculationConfig
from tdmpc2.corrector import load_corrector, save_corrector
from tdmpc2.distillation.dataset import read_shard, write_shard
from tdmpc2.envs import dmc, import_module
from tdmpc2.errors import CheckpointError, ConfigError
from tdmpc2.evaluation import choose as choosing
from tdmpc2.evaluation import evaluate, perturbed
from tdmpc2.evaluation.choose import Choice
from tdmpc2.evaluation.config import EpisodesConfig, EvaluationConfig
from tdmpc2.evaluation.metrics import act_columns, act_times
from tdmpc2.evaluation.rollout import random_returns
from tdmpc2.evaluation.runs import Subject, latency_of
from tdmpc2.files import flat, in_use, read_json, write_json
from tdmpc2.loading import open_checkpoint
from tdmpc2.progress import SILENT
from tdmpc2.teacher import open_teacher
from tdmpc2.workers import HERE
from tdmpc2.world_model import fingerprint

ROOT = Path(__file__).parents[1]
TEACHER = Path(__file__).parent / "fixtures/official/state_small.pt"
MODES = [
    *("baseline", "half_budget", "naive_3", "naive_6", "plan_3", "plan_6"),
    *(f"two_tower_{k}" for k in (3, 6, 12, 24)),
    *(f"two_tower_{k}_refined" for k in (3, 6, 12, 24)),
    *(f"temporal_{k}" for k in (3, 6, 12, 24)),
    *(f"temporal_{k}_refined" for k in (3, 6, 12, 24)),
    *("distilled", "distilled_refined", "prior"),
]
SMALL = [
    *("planner.num_samples=16", "planner.iterations=1", "planner.num_elites=4", "planner.num_pi_trajs=4"),
    *("planner.compile=false", "planner.precision=float32"),
    *("data.episodes=3", "rounds=1", "data.round_episodes=4", "data.num_envs=4", "round_updates=2"),
    *("distillation.rollout_steps=4", "distillation.updates=2", "distillation.batch_size=8"),
    *("distillation.validate_every=1", "distillation.width=32", "distillation.window=3"),
    *("evaluation.episodes=3", "evaluation.calibration_episodes=2", "evaluation.label_episodes=1"),
    *("evaluation.latency_steps=4", "evaluation.num_envs=4", "workers=1"),
]


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("user")
    for module, name, fail_at in (("short_task", "Short-v0", 0), ("broken_task", "Broken-v0", 5)):
        register = f'gym.register("{name}", entry_point=Short, max_episode_steps=8)'
        (folder / f"{module}.py").write_text(f"FAIL_AT = {fail_at}\n{ENVIRONMENT}\n{register}\n")
    return folder


def script(name: str, workdir: Path, *arguments: str) -> subprocess.CompletedProcess:
    """Run a verb as its command line would, in this process, which has PyTorch loaded."""
    status, out, err = 0, io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.chdir(workdir)
        patch.syspath_prepend(workdir)
        patch.setattr(sys, "argv", ["tdmpc2", name, *arguments])
        try:
            commands.main()
        except SystemExit as e:
            status = e.code  # type: ignore[assignment]
    return subprocess.CompletedProcess(["tdmpc2", name, *arguments], status, out.getvalue(), err.getvalue())


def accelerate(workdir: Path, *arguments: str) -> subprocess.CompletedProcess:
    task = "task=short_task:Short-v0"
    return script("accelerate", workdir, task, f"checkpoint={TEACHER}", *SMALL, *arguments)


@pytest.fixture(scope="module")
def finished(workdir: Path) -> Path:
    result = accelerate(workdir, "out=done")
    assert result.returncode == 0, result.stderr
    assert "two_tower_6: " in result.stdout, "a mode that ends leaves a line where no terminal is"
    rows = {line.split()[0] for line in result.stdout.splitlines() if "[" in line}
    assert set(MODES) <= rows, "the table in the terminal shows all modes"
    assert "`tdmpc2 play done task=short_task:Short-v0`" in result.stdout, "the module is imported by task="
    return workdir / "done"


def without_figures(patch: pytest.MonkeyPatch) -> None:
    """The report is an empty file: its figures, which take seconds, are in `finished`."""

    def write_report(out: Path, *_: Any) -> Path:
        (out / "report.html").touch()
        return out / "report.html"

    patch.setattr(evaluate, "write_report", write_report)


@pytest.fixture(scope="module")
def one_corrector(workdir: Path) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        without_figures(patch)
        result = accelerate(workdir, "distillation.architecture=two_tower", "out=one")
    assert result.returncode == 0, result.stderr
    return workdir / "one"


def test_the_evidence_is_complete(finished: Path) -> None:
    evaluation = finished / "evaluation"
    summary = pd.read_csv(evaluation / "summary.csv").set_index("mode")
    assert list(summary.index) == MODES
    assert summary.loc["baseline", "planner_calls"] == 1.0 and summary.loc["prior", "planner_calls"] == 0.0
    assert summary.loc["naive_3", "planner_calls"] == pytest.approx(3 / 8)
    episodes = pd.read_csv(evaluation / "episodes.csv")
    assert all(sorted(own) == [20000, 20001, 20002] for _, own in episodes.groupby("mode")["seed"])
    steps = pd.read_csv(evaluation / "steps.csv")
    totals = steps.groupby(["mode", "seed"])["reward"].sum()
    assert np.allclose(totals.sort_index(), episodes.set_index(["mode", "seed"])["return"].sort_index())
    labelled = steps[steps["seed"] == 20000]
    assert labelled["teacher_distance"].notna().all() and steps["teacher_distance"].isna().any()
    report = (evaluation / "report.html").read_text()
    assert all(mode in report for mode in MODES) and report.count("<svg") == 4
    assert "://" not in report
    assert set(json.loads((evaluation / "chosen.json").read_text())) == {"mode", "why", "speculation"}
    modes = json.loads((evaluation / "provenance.json").read_text())["modes"]
    assert all((mode["refine_steps"] > 0) == name.endswith("_refined") for name, mode in modes.items())
    by_k = pd.read_csv(evaluation / "by_step_in_plan.csv").set_index(["mode", "k"])
    assert {k for mode, k in by_k.index if mode == "two_tower_6"} >= {0, 1}
    assert steps.groupby(["mode", "seed"])["action_change"].apply(lambda x: x.isna().sum()).eq(1).all()


def test_the_folder_opens_as_an_agent(finished: Path, tmp_path: Path) -> None:
    """Whatever mode was chosen; here it is made one with a corrector, and acts as that corrector says."""
    agent = tdmpc2.load_agent(finished)
    assert isinstance(agent, tdmpc2.SpeculativeAgent)
    chosen = json.loads((finished / "evaluation/chosen.json").read_text())["speculation"]
    assert agent.config == SpeculationConfig(**chosen)

    folder = shutil.copytree(finished, tmp_path / "agent")
    config = json.loads((folder / "config.json").read_text())
    mode = SpeculationConfig(execution_horizon=3, corrector="temporal")
    config["speculation"] = asdict(mode)
    (folder / "config.json").write_text(json.dumps(config))
    agent = tdmpc2.load_agent(folder, compute=EAGER)
    assert isinstance(agent, tdmpc2.SpeculativeAgent)
    opened = open_checkpoint(finished)
    teacher = TDMPC2(opened.model, opened.planner, discount=opened.discount)
    corrector = load_corrector(finished / "correctors/temporal", fingerprint(opened.model))
    twin = tdmpc2.SpeculativeAgent(teacher, mode, corrector)
    for obs in np.random.default_rng(0).normal(size=(7, 24)).astype(np.float32):
        assert np.array_equal(agent.act(obs), twin.act(obs))
    assert agent.info is not None and agent.info.kind.item() == Kind.PLANNED  # 0, 3 and 6 are

    del config["speculation"]["corrector"]
    config["speculation"]["exeuction_horizon"] = 3
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="exeuction_horizon"):
        tdmpc2.load_agent(folder)


def test_a_finished_run_is_not_run_again(finished: Path, workdir: Path) -> None:
    """Nor does it say where shards were made that it did not make."""
    data = {p: p.stat().st_mtime_ns for p in finished.rglob("*.safetensors") if p.name != "model.safetensors"}
    made_by = finished / "data/teacher/provenance.json"
    text = made_by.read_text()
    made_by.unlink()
    assert accelerate(workdir, "out=done").returncode == 0
    assert {p: p.stat().st_mtime_ns for p in data} == data and not made_by.exists()
    made_by.write_text(text)


def test_episodes_made_before_there_was_a_setting_are_refused(finished: Path, workdir: Path) -> None:
    path = finished / "evaluation/modes/naive_3/settings.json"
    text = path.read_text()
    path.write_text(json.dumps({name: x for name, x in json.loads(text).items() if name != "refine_steps"}))
    one_line(accelerate(workdir, "out=done"), "naive_3", "refine_steps=null, not 0")
    path.write_text(text)


def test_kill_9_and_go_on(one_corrector: Path, workdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed twice, and started again each time, it has the results of a run that was not."""
    out = workdir / "killed"
    command = [sys.executable, "-m", "tdmpc2", "accelerate", "task=short_task:Short-v0"]
    command += [f"checkpoint={TEACHER}", *SMALL, "distillation.architecture=two_tower", f"out={out}"]
    for seen in ("data/round-1", "evaluation/modes/naive_3"):  # it is killed once that is there
        process = subprocess.Popen(command, cwd=workdir, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while not (out / seen).exists():
            assert process.poll() is None, "it ended before it could be killed"
            time.sleep(0.002)
        process.kill()
        assert process.wait() == -signal.SIGKILL
        assert not (out / "config.json").exists()
    without_figures(monkeypatch)
    assert accelerate(workdir, "distillation.architecture=two_tower", f"out={out}").returncode == 0
    for name in ("episodes.csv", "steps.csv", "by_step_in_plan.csv"):
        assert (out / "evaluation" / name).read_bytes() == (one_corrector / "evaluation" / name).read_bytes()


def test_more_rounds_go_on_from_those_that_there_are(workdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that is asked for more rounds ends like one that was asked for all of them at once.

    What it computed on before does not matter.
    """
    monkeypatch.syspath_prepend(workdir)
    import_module("short_task:Short-v0")
    without_figures(monkeypatch)
    less = ["distillation.architecture=two_tower", "evaluation.episodes=1"]
    given = [f"checkpoint={TEACHER}", *SMALL, *less]
    settings = OmegaConf.to_container(OmegaConf.from_dotlist(given))
    job = from_json(AccelerateConfig, {"task": "short_task:Short-v0", **settings})
    grown, at_once = (replace(job, out=str(workdir / name)) for name in ("grown", "at-once"))
    run_job(grown, SILENT)
    corrector = "two_tower/corrector.safetensors"
    first = (workdir / "grown/correctors" / corrector).read_bytes()
    begun = workdir / "grown/settings.json"
    elsewhere = read_json(begun)
    elsewhere |= {"device": "cuda", "checkpoint": "other.pt", "out": "moved"}
    elsewhere["planner"]["compile"] = True
    write_json(begun, elsewhere)
    for config in (grown, at_once):
        run_job(replace(config, rounds=2), SILENT)
    for name in (f"correctors/{corrector}", "evaluation/episodes.csv", "evaluation/chosen.json"):
        assert (workdir / "grown" / name).read_bytes() == (workdir / "at-once" / name).read_bytes()
    assert (workdir / "grown/rounds/2" / corrector).read_bytes() == first
    assert (workdir / "grown/rounds/2/evaluation/report.html").exists()
    assert read_json(begun)["device"] == "cpu"
    write_json(begun, {**read_json(begun), "device": "cuda"})
    run_job(replace(grown, rounds=2), SILENT)
    about = read_json(workdir / "grown/evaluation/provenance.json")
    assert "commit " in about["trained"] and about["settings"]["distillation"]["width"] == 32
    with pytest.raises(ConfigError, match="rounds=2, not 1"):
        run_job(grown, SILENT)
    wider = replace(grown, rounds=2, distillation=replace(grown.distillation, width=64))
    with pytest.raises(ConfigError, match=r"with distillation\.width=32, not 64: choose another out="):
        run_job(wider, SILENT)
    flat_settings = flat(read_json(begun))
    write_json(begun, {name.rpartition(".")[2]: value for name, value in flat_settings.items()})
    with pytest.raises(ConfigError, match='architecture="two_tower", which is no longer a setting: choose'):
        run_job(replace(grown, rounds=2), SILENT)


def one_line(result: subprocess.CompletedProcess, *words: str) -> None:
    assert result.returncode == 1
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, result.stderr
    assert all(word in lines[0] for word in words), lines[0]


def test_other_settings_in_the_same_folder_are_refused(finished: Path, workdir: Path) -> None:
    other = accelerate(workdir, "out=done", "evaluation.quantile=0.5")
    one_line(other, "evaluation.quantile=0.9, not 0.5", "out=")


def test_mistakes_end_in_one_line(workdir: Path) -> None:
    teacher = f"checkpoint={TEACHER}"
    one_line(script("accelerate", workdir, "task=walker-wlak", teacher, "out=a"), "walker-walk")
    one_line(script("accelerate", workdir, "task=walker-walk", "checkpoint=none.pt"), "none.pt")
    one_line(script("accelerate", workdir, "task=cartpole-swingup", teacher, "out=a"), "another task")
    one_line(script("accelerate", workdir, "task=walker-walk", teacher, "epsiodes=3"), "data.episodes")
    overlap = script("accelerate", workdir, "task=walker-walk", teacher, "data.seed=20000", "out=b")
    one_line(overlap, "overlap")
    assert not (workdir / "a").exists() and not (workdir / "b").exists()


@pytest.mark.parametrize(
    "mistake",
    [
        {"distillation.width": 33},
        {"distillation.held_out_every": 1},
        {"distillation.architecture": "three_tower"},
        {"distillation.architecture": "distilled"},
        {"evaluation.label_episodes": 5, "evaluation.num_envs": 4},
        {"evaluation.calibration_episodes": 1},
        {"evaluation.quantile": 0.0},
        {"evaluation.seed": 10_000},
        {"evaluation.seed": -1},
        {"data.episodes": 2},
        {"data.seed": 20_000},
        {"rounds": -1},
        {"distillation.weight_decay": -1.0},
        {"distillation.lr": float("inf")},
        {"planner.num_elites": 1000},
        {"planner.precision": "float16"},
        {"device": "gpu"},
    ],
)
def test_a_mistake_is_found_before_anything_is_written(mistake: dict[str, Any], tmp_path: Path) -> None:
    given = {"task": "walker-walk", "checkpoint": str(TEACHER), "out": str(tmp_path / "a"), **nested(mistake)}
    with pytest.raises(ConfigError, match=f"^{next(iter(mistake))}="):
        run_job(from_json(AccelerateConfig, given), SILENT)
    assert not (tmp_path / "a").exists()


def test_a_simulator_that_fails_is_named(workdir: Path) -> None:
    result = script(
        "accelerate", workdir, "task=broken_task:Broken-v0", f"checkpoint={TEACHER}", *SMALL, "out=broken"
    )
    one_line(result, "Broken-v0", "blew up")


def test_correctors_of_another_teacher_are_refused(finished: Path, workdir: Path) -> None:
    other = Path(__file__).parent / "fixtures/official/state_small.pt"
    model = tdmpc2.load_world_model(other)
    model.policy[2].bias.data += 0.1
    from tdmpc2.world_model import save_world_model

    save_world_model(workdir / "other", model)
    result = script(
        "compare",
        workdir,
        "task=short_task:Short-v0",
        "checkpoint=other",
        "correctors=done/correctors",
        "out=refused",
    )
    one_line(result, "distilled from teacher")


def test_correctors_are_not_evaluated_on_what_they_were_trained_on(finished: Path, workdir: Path) -> None:
    arguments = ["task=short_task:Short-v0", f"checkpoint={TEACHER}", "planner.compile=false"]
    arguments += ["evaluation.episodes=3", "evaluation.seed=6"]
    result = script("compare", workdir, *arguments, "correctors=done/correctors", "out=no")
    one_line(result, "was trained on episodes with seeds of this evaluation: change evaluation.seed")


def test_a_half_trained_corrector_is_not_evaluated(finished: Path, workdir: Path) -> None:
    teacher = tdmpc2.load_world_model(finished)
    half = load_corrector(finished / "correctors/two_tower", None)
    save_corrector(workdir / "half/two_tower", half, fingerprint(teacher))
    arguments = ["task=short_task:Short-v0", f"checkpoint={TEACHER}", "planner.compile=false"]
    result = script("compare", workdir, *arguments, "correctors=half", "out=refused")
    one_line(result, "half/two_tower did not end")


BASE, PLAN, STEP = 100.0, 40.0, 1.0  # return; time of a plan and of another step, ms


def choose(
    modes: dict[str, tuple[int, float, float]],
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    pushed: dict[str, float] | None = None,
    random: float = 0.0,
    step_ms: dict[str, float] | None = None,
    **settings: float,
) -> tuple[Choice, list[str]]:
    """The choice among `modes`, each an execution horizon, planner calls and a return; and what was tried."""
    table = {"baseline": (1, 1.0, BASE), **modes}
    tried: list[str] = []
    latency = pd.DataFrame(
        [
            (name, kind, ms)
            for name in table
            for kind, ms in (("planned", PLAN), ("corrected", (step_ms or {}).get(name, STEP)))
        ],
        columns=["mode", "kind", "act_ms"],
    )

    def summary(subject: Subject, own: dict[str, Any], times: pd.DataFrame, *_: Any) -> pd.DataFrame:
        rows = []
        for name in own:
            _, calls, returned = table[name]
            if subject.teacher.perturbation is not None:
                returned = {"baseline": 80.0, **dict.fromkeys(modes, 80.0), **(pushed or {})}[name]
            elif name not in tried:
                tried.append(name)
            rows.append(
                {
                    "mode": name,
                    "return_mean": returned,
                    "return_ratio_low": returned / BASE,
                    "return_difference_low": returned - BASE,
                    **act_columns(*act_times(times, name, calls)),
                }
            )
        return pd.DataFrame(rows)

    monkeypatch.setattr(choosing, "calibration_summary", summary)
    monkeypatch.setattr(choosing, "execute", lambda *_: None)
    monkeypatch.setattr(choosing, "returns_of_random_actions", lambda *_: np.full(2, random))
    monkeypatch.setattr(dmc, "EPISODE_STEPS", 2)
    teacher = open_teacher("walker-walk", str(TEACHER), SMALL_BUDGET)
    config = EvaluationConfig(**settings)  # type: ignore[arg-type]
    speculation = {name: SpeculationConfig(horizon) for name, (horizon, *_) in table.items()}
    subject = Subject(teacher, {})
    under_pushes = choosing.under_pushes(subject)
    choice = choosing.choose(subject, under_pushes, speculation, latency, config, folder, HERE)
    return choice, tried[1:]


SMALL_BUDGET = BudgetOverride(num_samples=16, iterations=1, num_elites=4, num_pi_trajs=4, compile=False)
CANDIDATES = {
    "near": (3, 0.34, 100.0),
    "far": (24, 0.05, 100.0),
    "lossy": (24, 0.042, 90.0),
    "prior": (1, 0.0, 100.0),
}


@pytest.mark.parametrize(
    ("change", "pushed", "settings", "chosen"),
    [
        ({}, {}, {}, "far"),
        ({"far": (24, 0.5, 100.0)}, {}, {}, "near"),  # falls back too often to save time
        ({"far": (24, 0.05, 97.0)}, {}, {}, "near"),  # loses return
        ({"far": (24, 0.05, 97.0)}, {}, {"min_return": 0.97}, "far"),
        ({}, {"far": 70.0}, {}, "near"),  # is lost under pushes
        ({}, {"far": 70.0}, {"min_return_pushed": 0.85}, "far"),
        ({"other": (24, 0.051, 101.0)}, {}, {}, "other"),  # as fast, and better
        ({"other": (12, 0.10, 101.0)}, {}, {}, "far"),  # better, and slower
    ],
)
def test_the_chosen_mode_is_the_fastest_that_holds_up(
    change: dict, pushed: dict, settings: dict, chosen: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    choice, tried = choose({**CANDIDATES, **change}, tmp_path, monkeypatch, pushed, **settings)
    assert choice.mode == chosen and choice.why.startswith("it takes the least time")
    assert "prior" not in tried


def test_the_time_of_a_step_counts_as_well_as_the_planner_calls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modes = {"far": (24, 0.05, 100.0), "near": (12, 0.09, 100.0)}
    choice, tried = choose(modes, tmp_path, monkeypatch, step_ms={"far": 10.0})
    assert choice.mode == "near"
    assert tried == ["near"], "what cannot be faster is not tried"


def test_no_mode_is_chosen_that_is_not_clearly_faster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    choice, _ = choose({"slow": (3, 0.34, 100.0)}, tmp_path, monkeypatch, step_ms={"slow": 30.0})
    assert choice.mode == "baseline" and "in less than 0.8 of the time" in choice.why
    choice, _ = choose(CANDIDATES, tmp_path, monkeypatch, dict.fromkeys(CANDIDATES, 10.0))
    assert choice.mode == "baseline" and "(far, near) none keeps 0.95" in choice.why


@pytest.mark.parametrize("random", [BASE, 120.0])
def test_nothing_is_chosen_for_a_teacher_that_fails(
    random: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the modes do: all of them keep the return of a teacher that does nothing."""
    choice, tried = choose(CANDIDATES, tmp_path, monkeypatch, random=random)
    assert choice.mode == "baseline" and choice.why.startswith("the teacher itself fails")
    assert f"random actions reach {random:.1f}" in choice.why and not tried


def test_a_teacher_that_fails_is_said_before_the_work(workdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    main_job = sys.modules["tdmpc2.accelerate"]

    def train(*_: Any) -> None:
        raise ConfigError("training")

    monkeypatch.setattr(main_job, "train_corrector", train)
    for random, warned in ((-1e9, False), (1e9, True)):
        monkeypatch.setattr(main_job, "returns_of_random_actions", lambda *_, r=random: np.full(3, r))
        result = accelerate(workdir, f"out=fails-{warned}")
        one_line(result, "training")
        assert ("WARNING: the teacher itself fails" in result.stdout) == warned


def test_random_actions_are_measured_on_the_same_seeds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dmc, "EPISODE_STEPS", 5)
    teacher = open_teacher("walker-walk", str(TEACHER), SMALL_BUDGET)
    first, again = (random_returns(teacher.env, range(3)) for _ in range(2))
    assert first.shape == (3,) and np.array_equal(first, again) and len(set(first)) == 3


def test_modes_are_tried_under_real_pushes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dmc, "EPISODE_STEPS", 20)
    monkeypatch.setattr(choosing, "returns_of_random_actions", lambda *_: np.full(3, -1.0))
    teacher = open_teacher("walker-walk", str(TEACHER), SMALL_BUDGET)
    config = EvaluationConfig(calibration_episodes=3, num_envs=3, min_return_pushed=0.001, latency_steps=8)
    modes = {"baseline": SpeculationConfig(1), "naive": SpeculationConfig(4)}
    monkeypatch.setattr(choosing, "holds_up", lambda summary, least: pd.Series(True, summary.index))
    subject = Subject(teacher, {})
    latency = latency_of(subject, modes, 0, config.latency_steps, tmp_path / "latency.csv", HERE)
    latency["act_ms"] = np.where(latency["kind"] == "planned", 10.0, 1.0)
    pushed_subject = choosing.under_pushes(subject)
    choice = choosing.choose(subject, pushed_subject, modes, latency, config, tmp_path, HERE)
    assert choice.mode == "naive" and "under pushes" in choice.why
    calm, pushed = (pd.read_csv(tmp_path / name / "baseline/episodes.csv") for name in ("modes", "pushed"))
    assert list(calm["seed"]) == list(pushed["seed"]) and (calm["return"] != pushed["return"]).any()


def as_walker(finished: Path, folder: Path) -> Path:
    """The same teacher, correctors and data put on a simulator that can be perturbed."""
    shutil.copytree(finished, folder)
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**content, "task": "walker-walk"}))
    for shard in (folder / "data").rglob("*.safetensors"):
        tensors, header = read_shard(shard)
        write_shard(shard, tensors, {**header, "task": "walker-walk"})
    return folder


def test_experiments(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them on episodes of 20 steps; and again where the last ones are missing."""
    monkeypatch.setattr(dmc, "EPISODE_STEPS", 8)
    for name, few in {"QUANTILES": (0.97,), "UNROLLED": (2,), "HEAD_UPDATES": 2, "LONG": 5}.items():
        monkeypatch.setattr(experiments, name, few)
    folder = as_walker(finished, tmp_path / "agent")
    usual = experiments.ExperimentConfig(agent=str(folder), out=str(tmp_path / "out"))
    trained = {"updates": 2, "batch_size": 4, "rollout_steps": 4, "validate_every": 1}
    trained |= {"width": 32, "window": 3}
    config = replace(
        usual,
        round_episodes=2,
        planner=BudgetOverride(num_samples=16, compile=False),
        evaluation=replace(usual.evaluation, episodes=2, calibration_episodes=2, num_envs=2),
        distillation=replace(usual.distillation, **trained),
    )
    experiments.main(config)
    done = tmp_path / "out/walker-walk.csv"
    table = pd.read_csv(done, keep_default_na=False)
    names = {"baseline", "executed", "as it is", "loss", "input", "unrolled steps", "label", "data", "bursts"}
    assert set(table["experiment"]) == names | {"budget", "refinement", "plan", "acceptance"}
    variants = table.groupby(["experiment", "variant", "disturbance"])["seed"].apply(list)
    assert set(map(tuple, variants)) == {(40000, 40001)}
    unperturbed = table[table["disturbance"] == ""].groupby("variant")["return"].apply(list)
    assert unperturbed["the mean, 1 step"] != unperturbed["baseline"]
    assert unperturbed["the mean, 3 steps"] != unperturbed["the elite drawn, 3 steps"]
    refined = table[(table["experiment"] == "refinement") & (table["disturbance"] == "")]
    assert refined.groupby("variant")["return"].apply(tuple).nunique() == 6
    page = write_results.all_experiments(2 * [write_results.Experiments(done)])
    written = {tuple(cell.strip() for cell in row.split("|")[1:3]) for row in page.splitlines() if "|" in row}
    variants = table.loc[table["experiment"] != "baseline", ["experiment", "variant"]]
    assert set(variants.itertuples(index=False, name=None)) <= written
    table[:-4].to_csv(done.with_suffix(".csv.running"), index=False)
    done.unlink()
    about = done.with_suffix(".json")
    about.rename(about.with_suffix(".json.running"))
    with pytest.raises(ConfigError, match="other settings"):
        experiments.main(replace(config, distillation=replace(config.distillation, updates=3)))
    experiments.main(config)
    pd.testing.assert_frame_equal(pd.read_csv(done, keep_default_na=False), table)


def test_perturbed(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dmc, "EPISODE_STEPS", 20)
    monkeypatch.setattr(perturbed, "STRENGTHS", {"obs_noise": (0.0, 3.0)})
    folder = as_walker(finished, tmp_path / "agent")
    config = perturbed.PerturbedConfig(
        workers=1,
        agent=str(folder),
        kinds=("obs_noise",),
        planner=BudgetOverride(compile=False),
        evaluation=EpisodesConfig(3, num_envs=3),
    )
    table = perturbed.evaluate_perturbed(config, SILENT)
    chosen = json.loads((finished / "evaluation/chosen.json").read_text())["mode"]
    modes = list(dict.fromkeys(["baseline", chosen, "naive_6", "distilled_refined", "prior"]))
    assert list(table["mode"]) == 2 * modes and list(table["strength"]) == len(modes) * [0.0] + len(modes) * [
        3.0
    ]
    returns = table.pivot(index="mode", columns="strength", values="return_mean")
    assert (returns[0.0] != returns[3.0]).all(), "every mode sees the noise"
    pd.testing.assert_frame_equal(perturbed.evaluate_perturbed(config, SILENT), table)  # read back
    with in_use(folder / "perturbed"), pytest.raises(ConfigError, match="in use by another process"):
        perturbed.evaluate_perturbed(config, SILENT)
    with pytest.raises(ConfigError, match="num_envs=3, not 2"):
        perturbed.evaluate_perturbed(replace(config, evaluation=EpisodesConfig(2, num_envs=2)), SILENT)
    provenance = read_json(folder / "evaluation/provenance.json")
    write_json(
        folder / "evaluation/provenance.json", {k: v for k, v in provenance.items() if k != "evaluation"}
    )
    with pytest.raises(CheckpointError, match="earlier version: make it again with `tdmpc2 accelerate`"):
        perturbed.evaluate_perturbed(config, SILENT)


def test_mistakes_of_perturb(finished: Path, workdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = script("perturb", workdir, "agent=done", "task=short_task:Short-v0", "planner.compile=false")
    one_line(own, "Short-v0", "MuJoCo")
    with pytest.raises(CheckpointError, match="nowhere"):
        perturbed.evaluate_perturbed(perturbed.PerturbedConfig(agent="nowhere"), SILENT)
    one_line(script("perturb", workdir, "agent=done", "kinds=[storm]"), "kinds=['storm']", "obs_noise")
    one_line(script("perturb", workdir, "agent=done", "evaluation.num_envs=0"), "evaluation.num_envs=0")
    monkeypatch.syspath_prepend(workdir)
    import_module("short_task:Short-v0")
    calibrated = perturbed.PerturbedConfig(
        agent=str(finished), workers=1, evaluation=EpisodesConfig(seed=10_001)
    )
    with pytest.raises(ConfigError, match="calibrated on episodes with these seeds"):
        perturbed.evaluate_perturbed(calibrated, SILENT)
