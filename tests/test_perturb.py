"""Perturbed environments: they perturb, alike for everyone, and leave nothing behind."""

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from research import experiments
from tdmpc2 import load_agent, load_world_model, make_env
from tdmpc2.config import EAGER, BudgetOverride
from tdmpc2.envs.dmc import DmControl
from tdmpc2.envs.perturb import KINDS, Perturbed
from tdmpc2.errors import CheckpointError, ConfigError, TaskError
from tdmpc2.evaluation.perturbed import PerturbedConfig, evaluate_perturbed
from tdmpc2.files import write_json
from tdmpc2.progress import SILENT
from tdmpc2.teacher import Teacher, open_teacher
from tdmpc2.training.trainer import TrainConfig, Trainer
from tdmpc2.world_model import save_world_model

TEACHER = str(Path(__file__).parent / "fixtures/official/state_small.pt")

STEPS = 120


def episode(env, seed: int = 3) -> np.ndarray:
    """Observations `[T, obs]` under fixed random actions."""
    rng = np.random.default_rng(0)
    observations = [env.reset(seed=seed)[0]]
    for _ in range(STEPS):
        obs, _, terminated, _, _ = env.step(rng.uniform(-1, 1, env.action_space.shape).astype(np.float32))
        observations.append(obs)
        if terminated:
            break
    return np.stack(observations)


@pytest.mark.parametrize("task", ["cup-catch", "Walker2d-v5"])
@pytest.mark.parametrize(("kind", "strength"), [("push", 1.0), ("obs_noise", 0.1), ("mass", 1.5)])
def test_perturbs_by_seed(task: str, kind: str, strength: float) -> None:
    env = Perturbed(make_env(task), kind, strength)
    first = episode(env)
    assert first.dtype == np.float32
    assert not np.array_equal(first, episode(make_env(task)))
    assert not np.array_equal(first, episode(env, seed=4))
    assert np.array_equal(first, episode(env)), "an episode depends on its seed alone"


def test_no_strength_is_no_perturbation() -> None:
    plain = episode(make_env("cup-catch"))
    for kind, strength in {"push": 0.0, "obs_noise": 0.0, "mass": 1.0, "friction": 1.0}.items():
        assert np.array_equal(episode(Perturbed(make_env("cup-catch"), kind, strength)), plain)


def test_friction() -> None:
    """A foot on ice: the model's sliding friction, and only that, is scaled."""
    env = make_env("walker-walk")
    model = env.unwrapped.physics.model
    before = model.geom_friction.copy()
    Perturbed(env, "friction", 0.5)
    assert np.array_equal(model.geom_friction[:, 0], 0.5 * before[:, 0])
    assert np.array_equal(model.geom_friction[:, 1:], before[:, 1:])


def test_friction_needs_contact() -> None:
    with pytest.raises(TaskError, match="no contacts"):
        Perturbed(make_env("cartpole-swingup"), "friction", 0.5)


@pytest.mark.parametrize("strength", [0.7, 1.6])
def test_a_heavier_robot_is_not_said_to_move_otherwise(strength: float) -> None:
    """The walker's reward reads its subtree's velocity, which MuJoCo divides by a mass that it derives."""
    env = make_env("walker-walk")
    physics = Perturbed(env, "mass", strength).unwrapped.physics
    env.reset(seed=0)
    physics.data.qvel[:] = 0.0
    physics.named.data.qvel["rootx"] = 1.0
    physics.forward()
    assert physics.horizontal_velocity() == pytest.approx(1.0)


def test_a_push_ends() -> None:
    env = Perturbed(make_env("cartpole-swingup"), "push", 1.0)
    env.reset(seed=0)
    pushed = []
    for _ in range(400):
        env.step(np.zeros(1, np.float32))
        pushed.append(bool(np.any(env.unwrapped.physics.data.xfrc_applied)))
    assert 0.02 < np.mean(pushed) < 0.3
    env.reset(seed=1)
    assert not np.any(env.unwrapped.physics.data.xfrc_applied)


def test_wrong_use() -> None:
    with pytest.raises(ConfigError, match="push"):
        Perturbed(make_env("cup-catch"), "pusch", 1.0)
    for strength in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="at least 0"):
            Perturbed(make_env("cup-catch"), next(iter(KINDS)), strength)
    with pytest.raises(ConfigError, match="above 0"):
        Perturbed(make_env("cup-catch"), "mass", 0.0)
    with pytest.raises(TaskError, match="MuJoCo"):
        Perturbed(make_env("BipedalWalker-v3"), "mass", 2.0)
    env = make_env("BipedalWalker-v3")
    env.unwrapped.model, env.unwrapped.data = "a policy", "its data"
    with pytest.raises(TaskError, match="MuJoCo"):
        Perturbed(env, "mass", 2.0)
    env = make_env("cartpole-swingup")
    env.unwrapped.physics.model.body_mass[:] = 0.0
    with pytest.raises(TaskError, match="no body can be pushed"):
        Perturbed(env, "push", 1.0)


@pytest.mark.parametrize(
    ("error", "refused"),
    [
        (TaskError, lambda teacher: replace(teacher, task="cartpole-swingup").perturbed("friction", 0.5)),
        (ConfigError, lambda teacher: teacher.perturbed("pusch", 0.5)),
        (CheckpointError, lambda teacher: open_teacher("cartpole-swingup", TEACHER, BudgetOverride())),
        (ValueError, lambda teacher: replace(teacher, task_index=[]).env()),  # padding fails
        (ConfigError, lambda teacher: Trainer(TrainConfig(task="walker-walk", model_size=1, buffer_size=9))),
    ],
)
def test_a_refused_environment_is_closed(
    error: type[Exception], refused: Callable[[Teacher], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    made, closed = [], []
    init, close = DmControl.__init__, DmControl.close
    monkeypatch.setattr(DmControl, "__init__", lambda self, *a: made.append(self) or init(self, *a))
    monkeypatch.setattr(DmControl, "close", lambda self: closed.append(self) or close(self))
    monkeypatch.setattr("tdmpc2.teacher.PadForModel", lambda *a: int("x"))
    teacher = open_teacher("walker-walk", TEACHER, BudgetOverride())
    with pytest.raises(error):
        refused(teacher)
    assert len(made) == 2 and closed == made


def test_a_downloaded_folder_runs_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its config.json names a module, which comes with it or with this machine; it is never imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "evil.py").write_text("open('evil-was-here', 'w')")
    model = load_world_model(TEACHER)
    save_world_model(tmp_path, model, task="evil:Evil-v0")
    write_json(tmp_path / "evaluation/provenance.json", {})
    eager = BudgetOverride(compile=False)
    for evaluates in (
        lambda: evaluate_perturbed(PerturbedConfig(agent=".", planner=eager), SILENT),
        lambda: experiments.main(experiments.ExperimentConfig(agent=".", planner=eager)),
    ):
        with pytest.raises(
            TaskError, match=r"'evil' is not imported, .*: give task=\.\.\. on the command line"
        ):
            evaluates()
    with pytest.raises(CheckpointError, match="was made for evil:Evil-v0"):
        open_teacher("walker-walk", ".", eager)
    load_agent(".", compute=EAGER)
    assert "evil" not in sys.modules and not (tmp_path / "evil-was-here").exists()
