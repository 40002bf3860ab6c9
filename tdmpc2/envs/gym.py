"""Gymnasium's own continuous-control tasks, and whatever else is registered with Gymnasium.

`Hopper-v5`, `BipedalWalker-v3`, ... by their ids; a user's own environment by Gymnasium's spelling
`my_package:MyEnv-v0`, where importing `my_package` registers it. Terminations pass through, there
is no action repeat, and the time limit is the registered one.
"""

import importlib
import os
import sys
from functools import cache

import gymnasium
import numpy as np
from gymnasium.envs.registration import EnvSpec
from gymnasium.spaces import Box
from gymnasium.wrappers import TransformAction, TransformObservation

from tdmpc2.envs.guard import Array
from tdmpc2.errors import EnvironmentFailure, TaskError

Env = gymnasium.Env[Array, Array]

SUPPORTED = "supported are Box observations and continuous Box actions with finite bounds"
# Gymnasium's tasks that end by their time limit only. It offers no property that says so.
NEVER_TERMINATE = ("HalfCheetah", "HumanoidStandup", "Pusher", "Reacher", "Swimmer")
NOT_LISTED = ("CarRacing-v3", "LunarLander-v3")  # images; discrete actions


@cache
def tasks() -> list[str]:
    """Ids of Gymnasium's MuJoCo and Box2D tasks with continuous actions, the newest version of each."""
    newest: dict[str, EnvSpec] = {}
    for id, spec in gymnasium.registry.items():
        own = str(spec.entry_point).startswith(("gymnasium.envs.mujoco", "gymnasium.envs.box2d"))
        if own and id not in NOT_LISTED:
            newest[spec.name] = max(newest.get(spec.name, spec), spec, key=lambda s: s.version or 0)
    return [spec.id for spec in newest.values()]


def is_registered(task: str) -> bool:
    return ":" in task or task in gymnasium.registry


def make(task: str) -> Env:
    """The environment as Gymnasium makes it, with its `TimeLimit`, in TD-MPC2's form.

    Raises `TaskError` where it cannot be found or does not fit, `EnvironmentFailure` where building
    it fails.
    """
    if ":" in task:
        _import_module(task)
    kwargs = {"render_mode": "rgb_array"} if task in tasks() else {}
    try:
        env: Env = gymnasium.make(task, disable_env_checker=True, **kwargs)  # Guard checks
    except gymnasium.error.UnregisteredEnv as error:
        raise TaskError(f"unknown task {task!r}: {_one_line(error)}") from error
    except Exception as error:
        raise EnvironmentFailure(f"{task}: cannot be built: {_one_line(error)}") from error
    _check_fits(env, task)
    return rescale_action(_flatten(env))


def steps(env: Env) -> int:
    assert env.spec is not None and env.spec.max_episode_steps is not None  # _check_fits
    return env.spec.max_episode_steps


def is_episodic(env: Env) -> bool:
    """Whether it may terminate; of a user's environment, nothing else can be known."""
    return env.spec is None or env.spec.name not in NEVER_TERMINATE


def rescale_action(env: Env) -> Env:
    """Actions float32 `[A]` in [-1, 1], mapped linearly to the bounds of the environment's own."""
    space = env.action_space
    assert isinstance(space, Box)
    low, high = space.low.astype(np.float64), space.high.astype(np.float64)
    middle, half = (high + low) / 2, (high - low) / 2

    def rescale(action: Array) -> Array:
        # Clipped: the sum's rounding can leave the bounds, and an environment may insist on them.
        exact = middle + half * np.asarray(action, np.float64).reshape(space.shape)
        return np.clip(exact, low, high).astype(space.dtype)

    return TransformAction(env, rescale, Box(-1, 1, (middle.size,), np.float32))


def _flatten(env: Env) -> Env:
    """Observations float32 `[obs]`."""
    space = env.observation_space
    assert isinstance(space, Box)
    with np.errstate(over="ignore"):  # the largest float64 as a bound becomes infinity
        low, high = space.low.astype(np.float32).ravel(), space.high.astype(np.float32).ravel()
    flat = Box(low, high, dtype=np.float32)
    return TransformObservation(env, lambda obs: np.asarray(obs, np.float32).ravel(), flat)


def _check_fits(env: Env, task: str) -> None:
    obs, action = env.observation_space, env.action_space
    if not isinstance(obs, Box):
        raise TaskError(f"{task}: has {type(obs).__name__} observations; {SUPPORTED}")
    if obs.dtype == np.uint8 and len(obs.shape) == 3:
        raise TaskError(f"{task}: observes images; pixels (obs=rgb) exist for dm_control tasks only")
    if not isinstance(action, Box) or not np.issubdtype(action.dtype, np.floating):
        raise TaskError(f"{task}: has {type(action).__name__} actions; {SUPPORTED}")
    if not action.is_bounded():
        raise TaskError(f"{task}: its actions have no finite bounds; {SUPPORTED}")
    if env.spec is None or env.spec.max_episode_steps is None:
        raise TaskError(f"{task}: has no time limit; register it with max_episode_steps=...")


def _import_module(task: str) -> None:
    module = task.partition(":")[0]
    if os.getcwd() not in sys.path:  # a script's own folder is there, the user's is not
        sys.path.append(os.getcwd())
    try:
        importlib.import_module(module)
    except Exception as error:
        raise TaskError(
            f"task {task!r}: cannot import {module!r} ({_one_line(error)}); install it, or run from "
            "the folder that holds it"
        ) from error


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
