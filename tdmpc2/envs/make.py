"""Make the environment of a task.

The wrappers, from inside to outside: dm_control or Gymnasium, time limit, observation (flat, or stacked
frames), actions in [-1, 1], guard.
"""

from difflib import get_close_matches

import gymnasium
import numpy as np
from gymnasium.spaces import Box
from gymnasium.wrappers import (
    AddRenderObservation,
    FrameStackObservation,
    TimeLimit,
    TransformAction,
    TransformObservation,
)

from ..errors import ConfigError, TaskError
from . import dmc, gymnasium_tasks
from .guard import Array, Env, Guard, closed_on_error

FRAME_SIZE = 64  # pixels
FRAMES = 3


def make_env(task: str, seed: int = 0, obs: str = "state") -> Env:
    """The environment of a task, e.g. `walker-walk`, `Hopper-v5`, `my_package:MyEnv-v0`.

    Observation: float32 `[obs]`; with `obs="rgb"` (dm_control only) uint8 `[9, 64, 64]`, the last three
    frames, oldest first. Action: float32 `[A]` in [-1, 1]. dm_control tasks hold an action for two
    control steps, sum the rewards, and last 500 agent steps.

    The first `reset()` uses `seed`. `reset(seed=s)` makes the episode depend on `s` alone; a plain `reset()`
    continues the random stream. Import `my_package` first. While running, it raises as `Guard`.

    Raises:
        TaskError: the task is unknown or not supported, or its module is not imported.
        EnvironmentFailure: the environment cannot be built.
        ConfigError: `obs` or `seed` is invalid.
    """
    if obs not in ("state", "rgb"):
        raise ConfigError(f"obs={obs!r}: choose 'state' or 'rgb'")
    if not isinstance(seed, int | np.integer) or seed < 0:
        raise ConfigError(f"seed={seed}: must be a whole number, at least 0")
    if not isinstance(task, str):
        raise TaskError(f"unknown task {task!r}; a task is a name such as walker-walk")
    if found := dmc.find(task):
        return _make_dm_control(task, *found, seed, obs)
    if not gymnasium_tasks.is_registered(task):
        raise TaskError(_unknown(task))
    if obs == "rgb":
        raise TaskError(f"{task}: pixels (obs=rgb) exist for dm_control tasks only")
    env = gymnasium_tasks.make(task)
    steps, episodic = gymnasium_tasks.steps(env), gymnasium_tasks.is_episodic(env)
    return Guard(_rescale_action(env), task, seed, steps, episodic)


def list_tasks() -> list[str]:
    """The published names of all built-in tasks: the dm_control suite, then Gymnasium's."""
    published = {task: name for name, task in reversed(dmc.tasks().items())}
    return sorted(published.values()) + sorted(gymnasium_tasks.tasks())


def max_episode_steps(env: gymnasium.Env) -> int:
    """The time limit, in agent steps, of an environment made by `make_env`."""
    return env.get_wrapper_attr("max_episode_steps")


def is_episodic(env: gymnasium.Env) -> bool:
    """Whether an environment made by `make_env` may end an episode before its time limit.

    False for the dm_control suite (except lqr) and Gymnasium's tasks without termination; True for all other
    Gymnasium ids, also a user's own.
    """
    return env.get_wrapper_attr("episodic")


def _make_dm_control(name: str, domain: str, task: str, seed: int, obs: str) -> Env:
    if obs == "state":
        base = dmc.DmControl(domain, task)
    else:
        base = dmc.DmControl(domain, task, render_size=FRAME_SIZE)
    with closed_on_error(base):
        env: Env = TimeLimit(base, dmc.EPISODE_STEPS)
        if obs == "rgb":
            env = _stack_frames(AddRenderObservation(env))
        return Guard(_rescale_action(env), name, seed, dmc.EPISODE_STEPS, base.episodic)


def _rescale_action(env: Env) -> Env:
    """Take actions float32 `[A]` in [-1, 1], and map them linearly to the environment's bounds."""
    space = env.action_space
    assert isinstance(space, Box)
    low, high = space.low.astype(np.float64), space.high.astype(np.float64)
    middle, half = (high + low) / 2, (high - low) / 2

    def rescale(action: Array) -> Array:
        # Clipped: the sum's rounding can leave the bounds, and an environment may refuse that.
        exact = middle + half * np.asarray(action, np.float64).reshape(space.shape)
        return np.clip(exact, low, high).astype(space.dtype)

    return TransformAction(env, rescale, Box(-1, 1, (middle.size,), np.float32))


def _stack_frames(env: Env) -> Env:
    """Stack the last three frames `[64, 64, 3]`, channels first; the first frame is repeated."""
    stacked = FrameStackObservation(env, FRAMES, padding_type="reset")  # [3, 64, 64, 3]
    space = Box(0, 255, (3 * FRAMES, FRAME_SIZE, FRAME_SIZE), np.uint8)
    return TransformObservation(
        stacked, lambda frames: frames.transpose(0, 3, 1, 2).reshape(space.shape), space
    )


def _unknown(task: str) -> str:
    names = {name.lower(): name for name in [*dmc.tasks(), *gymnasium_tasks.tasks()]}
    near = [names[match] for match in get_close_matches(task.lower(), names, n=3)]
    hint = f"did you mean {', '.join(near)}?" if near else "tdmpc2.envs.list_tasks() has all names"
    if not dmc.is_installed():
        hint += "; dm_control's tasks need `pip install --no-deps dm_control`"
    return f"unknown task {task!r}; {hint}"
