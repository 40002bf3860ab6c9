"""Disturbed environments: they disturb, alike for everyone, and leave nothing behind."""

import numpy as np
import pytest

from tdmpc2 import make_env
from tdmpc2.envs.disturb import KINDS, Disturbed
from tdmpc2.errors import ConfigError, TaskError

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
def test_disturbs_by_seed(task: str, kind: str, strength: float) -> None:
    env = Disturbed(make_env(task), kind, strength)
    first = episode(env)
    assert first.dtype == np.float32
    assert not np.array_equal(first, episode(make_env(task)))
    assert not np.array_equal(first, episode(env, seed=4))
    assert np.array_equal(first, episode(env)), "an episode depends on its seed alone"


def test_no_strength_is_no_disturbance() -> None:
    plain = episode(make_env("cup-catch"))
    for kind, strength in {"push": 0.0, "obs_noise": 0.0, "mass": 1.0, "friction": 1.0}.items():
        assert np.array_equal(episode(Disturbed(make_env("cup-catch"), kind, strength)), plain)


def test_friction() -> None:
    """A foot on ice: the model's sliding friction, and only that, is scaled."""
    env = make_env("walker-walk")
    model = env.unwrapped.physics.model
    before = model.geom_friction.copy()
    Disturbed(env, "friction", 0.5)
    assert np.array_equal(model.geom_friction[:, 0], 0.5 * before[:, 0])
    assert np.array_equal(model.geom_friction[:, 1:], before[:, 1:])


def test_friction_needs_contact() -> None:
    with pytest.raises(TaskError, match="nothing touches"):
        Disturbed(make_env("cartpole-swingup"), "friction", 0.5)


@pytest.mark.parametrize("strength", [0.7, 1.6])
def test_a_heavier_robot_is_not_said_to_move_otherwise(strength: float) -> None:
    """The walker's reward reads its subtree's velocity, which MuJoCo divides by a mass that it derives."""
    env = make_env("walker-walk")
    physics = Disturbed(env, "mass", strength).unwrapped.physics
    env.reset(seed=0)
    physics.data.qvel[:] = 0.0
    physics.named.data.qvel["rootx"] = 1.0
    physics.forward()
    assert physics.horizontal_velocity() == pytest.approx(1.0)


def test_a_push_ends() -> None:
    env = Disturbed(make_env("cartpole-swingup"), "push", 1.0)
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
        Disturbed(make_env("cup-catch"), "pusch", 1.0)
    with pytest.raises(ConfigError, match="at least 0"):
        Disturbed(make_env("cup-catch"), next(iter(KINDS)), -1.0)
    with pytest.raises(TaskError, match="MuJoCo"):
        Disturbed(make_env("BipedalWalker-v3"), "mass", 2.0)
