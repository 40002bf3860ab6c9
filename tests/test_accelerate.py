"""The whole main job on a short task of a user's own, with a tiny teacher; and what ends it."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import tdmpc2

ROOT = Path(__file__).parents[1]
TEACHER = Path(__file__).parent / "fixtures/official/state_small.pt"
MODES = ["baseline", "naive_3", "naive_6", "two_tower_3", "two_tower_6", "temporal_3", "temporal_6", "prior"]
SMALL = [
    *("num_samples=16", "iterations=1", "num_elites=4", "num_pi_trajs=4"),
    *("compile=false", "precision=float32"),
    *("episodes=2", "rounds=1", "round_episodes=4", "num_envs=4"),
    *("updates=2", "batch_size=8", "validate_every=1", "width=32", "window=3"),
    *("eval_episodes=3", "calibration_episodes=2", "label_episodes=1", "latency_steps=12"),
]
ENVIRONMENT = '''
import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box


class Short(gym.Env):
    """Eight steps; the reward is 1 + the first action; the state drifts with the actions."""

    observation_space = Box(-np.inf, np.inf, (24,), np.float32)
    action_space = Box(-1.0, 1.0, (6,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.state, self.t = self.np_random.normal(size=24).astype(np.float32), 0
        return self.state.copy(), {}

    def step(self, action):
        self.t += 1
        if self.t == FAIL_AT:
            raise RuntimeError("the simulator blew up")
        self.state[:6] += 0.1 * action
        return self.state.copy(), 1.0 + float(action[0]), False, False, {}


'''


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("user")
    for module, name, fail_at in (("short_task", "Short-v0", 0), ("broken_task", "Broken-v0", 5)):
        register = f'gym.register("{name}", entry_point=Short, max_episode_steps=8)'
        (folder / f"{module}.py").write_text(f"FAIL_AT = {fail_at}\n{ENVIRONMENT}\n{register}\n")
    return folder


def script(name: str, workdir: Path, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "scripts" / f"{name}.py"), *arguments]
    return subprocess.run(command, cwd=workdir, capture_output=True, text=True, timeout=300)


def accelerate(workdir: Path, *arguments: str) -> subprocess.CompletedProcess:
    task = "task=short_task:Short-v0"
    return script("accelerate", workdir, task, f"checkpoint={TEACHER}", *SMALL, *arguments)


@pytest.fixture(scope="module")
def finished(workdir: Path) -> Path:
    result = accelerate(workdir, "out=done")
    assert result.returncode == 0, result.stderr
    assert all(mode in result.stdout for mode in MODES), "the table in the terminal shows all modes"
    return workdir / "done"


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
    assert all(mode in report for mode in MODES) and report.count("<svg") == 7
    assert "http://" not in report.replace("http://www.w3.org", "").replace("http://purl.org", "").replace(
        "http://creativecommons.org", ""
    ).replace("http://matplotlib", "")
    assert set(json.loads((evaluation / "chosen.json").read_text())) == {"mode", "speculation"}


def test_the_folder_opens_as_an_agent(finished: Path) -> None:
    agent = tdmpc2.load_agent(finished)
    assert isinstance(agent, tdmpc2.SpeculativeAgent)
    agent.reset()
    assert agent.act(np.zeros(24, dtype=np.float32)).shape == (6,)


def test_a_finished_run_is_not_run_again_and_a_killed_one_goes_on(finished: Path, workdir: Path) -> None:
    data = {p: p.stat().st_mtime_ns for p in finished.rglob("*.safetensors") if p.name != "model.safetensors"}
    before = pd.read_csv(finished / "evaluation/episodes.csv")
    for path in (finished / "evaluation/modes/temporal_6").iterdir():
        path.unlink()  # as if it had been killed in the last mode
    assert accelerate(workdir, "out=done").returncode == 0
    assert {p: p.stat().st_mtime_ns for p in data} == data
    pd.testing.assert_frame_equal(pd.read_csv(finished / "evaluation/episodes.csv"), before)


def one_line(result: subprocess.CompletedProcess, *words: str) -> None:
    assert result.returncode == 1
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, result.stderr
    assert all(word in lines[0] for word in words), lines[0]


def test_other_settings_in_the_same_folder_are_refused(finished: Path, workdir: Path) -> None:
    one_line(accelerate(workdir, "out=done", "quantile=0.5"), "other settings", "out=")


def test_mistakes_end_in_one_line(workdir: Path) -> None:
    teacher = f"checkpoint={TEACHER}"
    one_line(script("accelerate", workdir, "task=walker-wlak", teacher, "out=a"), "walker-walk")
    one_line(script("accelerate", workdir, "task=walker-walk", "checkpoint=none.pt"), "none.pt")
    one_line(script("accelerate", workdir, "task=cartpole-swingup", teacher, "out=a"), "another task")
    one_line(script("accelerate", workdir, "task=walker-walk", teacher, "epsiodes=3"), "episodes")
    overlap = script("accelerate", workdir, "task=walker-walk", teacher, "collect_seed=20000", "out=b")
    one_line(overlap, "overlap")


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
        "eval_corrector",
        workdir,
        "task=short_task:Short-v0",
        "checkpoint=other",
        "correctors=done/correctors",
        "out=refused",
    )
    one_line(result, "distilled from teacher")
