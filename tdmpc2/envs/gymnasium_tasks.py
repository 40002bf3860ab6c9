"""Gymnasium's continuous-control tasks, and all other environments registered with Gymnasium.

A task is an id, such as `Hopper-v5`. A user's own task is `my_package:MyEnv-v0`; importing `my_package`
registers it. Only `import_module` imports it, and only the command line calls `import_module`: a task from a
downloaded file must not run code. There is no action repeat, and the time limit is the registered one.
"""

import importlib
import os
import sys
from functools import cache
from typing import Any

import gymnasium
import numpy as np
from gymnasium.envs.registration import EnvSpec
from gymnasium.spaces import Box
from gymnasium.wrappers import TransformObservation

from ..errors import EnvironmentFailure, TaskError
from .guard import Array, Env, closed_on_error

SUPPORTED = "supported are Box observations and continuous Box actions with finite bounds"
# Gymnasium's tasks that end only by their time limit; no property says so.
NEVER_TERMINATE = ("HalfCheetah", "HumanoidStandup", "Pusher", "Reacher", "Swimmer")
NOT_LISTED = ("CarRacing-v3", "LunarLander-v3")  # images; discrete actions


@cache
def tasks() -> list[str]:
    """Ids of Gymnasium's continuous MuJoCo and Box2D tasks, newest versions only."""
    newest: dict[str, EnvSpec] = {}
    for spec in gymnasium.registry.values():
        own = str(spec.entry_point).startswith(("gymnasium.envs.mujoco", "gymnasium.envs.box2d"))
        if own and spec.id not in NOT_LISTED:
            newest[spec.name] = max(newest.get(spec.name, spec), spec, key=lambda s: s.version or 0)
    return [spec.id for spec in newest.values()]


def is_registered(task: str) -> bool:
    return ":" in task or task in gymnasium.registry


def make(task: str) -> Env:
    """Gymnasium's environment with its `TimeLimit`, and observations flattened to float32 `[obs]`.

    Raises:
        TaskError: the task is unknown or not supported, or its module is not imported.
        EnvironmentFailure: it cannot be built.
    """
    module, colon, _ = task.rpartition(":")
    if colon and module not in sys.modules:
        raise TaskError(
            f"task {task!r}: {module!r} is not imported, because a file may not import code: give "
            "task=... on the command line, or import it yourself"
        )
    kwargs: dict[str, Any] = {"render_mode": "rgb_array"} if task in tasks() else {}
    try:
        env: Env = gymnasium.make(task, disable_env_checker=True, **kwargs)  # Guard checks
    except gymnasium.error.UnregisteredEnv as error:
        raise TaskError(f"unknown task {task!r}: {_one_line(error)}") from error
    except (Exception, SystemExit) as error:
        raise EnvironmentFailure(f"{task}: cannot be built: {_one_line(error)}") from error
    with closed_on_error(env):
        _check_fits(env, task)
        return _flatten(env)


def import_module(task: str) -> None:
    """Import the module of a task `module:EnvId` that the user typed.

    Raises:
        TaskError: the module cannot be imported.
    """
    module = task.rpartition(":")[0]
    if os.getcwd() not in sys.path:  # Python adds the script's folder, not the user's
        sys.path.append(os.getcwd())
    try:
        importlib.import_module(module)
    except (Exception, SystemExit) as error:  # a script may call sys.exit
        raise TaskError(
            f"task {task!r}: cannot import {module!r} ({_one_line(error)}): install it, or run "
            "in the folder that contains it"
        ) from error


def steps(env: Env) -> int:
    assert env.spec is not None and env.spec.max_episode_steps is not None  # _check_fits
    return env.spec.max_episode_steps


def is_episodic(env: Env) -> bool:
    """Whether the environment may terminate; True for a user's own environment."""
    return env.spec is None or env.spec.name not in NEVER_TERMINATE


def _flatten(env: Env) -> Env:
    """The environment with observations float32 `[obs]`."""
    space = env.observation_space
    assert isinstance(space, Box)
    with np.errstate(over="ignore"):  # large float64 bounds become infinity
        low, high = space.low.astype(np.float32).ravel(), space.high.astype(np.float32).ravel()
    flat = Box(low, high, dtype=np.float32)

    def flatten(obs: Any) -> Array:
        with np.errstate(over="ignore"):  # Guard refuses infinity
            return np.asarray(obs, np.float32).ravel()

    return TransformObservation(env, flatten, flat)


def _check_fits(env: Env, task: str) -> None:
    obs, action = (getattr(env, f"{name}_space", None) for name in ("observation", "action"))
    if not isinstance(obs, Box):
        raise TaskError(f"{task}: has {type(obs).__name__} observations; {SUPPORTED}")
    if obs.dtype == np.uint8 and len(obs.shape) == 3:
        raise TaskError(f"{task}: observes images; only dm_control tasks can (obs=rgb)")
    if not isinstance(action, Box) or not np.issubdtype(action.dtype, np.floating):
        kind = action.dtype if isinstance(action, Box) else type(action).__name__
        raise TaskError(f"{task}: has {kind} actions; {SUPPORTED}")
    if 0 in (*obs.shape, *action.shape):
        raise TaskError(f"{task}: has observations {obs.shape} and actions {action.shape}: one is empty")
    if not action.is_bounded():
        raise TaskError(f"{task}: its actions have no finite bounds; {SUPPORTED}")
    if env.spec is None or env.spec.max_episode_steps is None:
        raise TaskError(f"{task}: has no time limit; register it with max_episode_steps=...")


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
