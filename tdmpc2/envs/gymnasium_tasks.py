"""Gymnasium's own continuous-control tasks, and whatever else is registered with Gymnasium.

`Hopper-v5`, `BipedalWalker-v3`, ... by their ids; a user's own environment by Gymnasium's spelling
`my_package:MyEnv-v0`, where importing `my_package` registers it. Only `import_module` imports it, which
nobody but the command line calls: tasks also stand in files that travel, and must not run code from there.
Terminations pass through, there is no action repeat, and the time limit is the registered one.
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
# Gymnasium's tasks that end by their time limit only. It offers no property that says so.
NEVER_TERMINATE = ("HalfCheetah", "HumanoidStandup", "Pusher", "Reacher", "Swimmer")
NOT_LISTED = ("CarRacing-v3", "LunarLander-v3")  # images; discrete actions


@cache
def tasks() -> list[str]:
    """Ids of Gymnasium's continuous MuJoCo and Box2D tasks, each in its newest version."""
    newest: dict[str, EnvSpec] = {}
    for spec in gymnasium.registry.values():
        own = str(spec.entry_point).startswith(("gymnasium.envs.mujoco", "gymnasium.envs.box2d"))
        if own and spec.id not in NOT_LISTED:
            newest[spec.name] = max(newest.get(spec.name, spec), spec, key=lambda s: s.version or 0)
    return [spec.id for spec in newest.values()]


def is_registered(task: str) -> bool:
    return ":" in task or task in gymnasium.registry


def make(task: str) -> Env:
    """The environment as Gymnasium makes it, with its `TimeLimit`, but observations flattened to
    float32 `[obs]`.

    Raises `TaskError` where it cannot be found, its module is not imported, or it does not fit,
    `EnvironmentFailure` where building it fails.
    """
    module, colon, _ = task.rpartition(":")
    if colon and module not in sys.modules:
        raise TaskError(
            f"task {task!r}: {module!r} is not imported, for a task in a file may not import anything: give "
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
    """Import the module of a task `module:EnvId` that the user has typed.

    Raises:
        TaskError: it cannot be imported.
    """
    module = task.rpartition(":")[0]
    if os.getcwd() not in sys.path:  # a script's own folder is there, the user's is not
        sys.path.append(os.getcwd())
    try:
        importlib.import_module(module)
    except (Exception, SystemExit) as error:  # a script may end itself
        raise TaskError(
            f"task {task!r}: cannot import {module!r} ({_one_line(error)}); install it, or run "
            "from the folder that holds it"
        ) from error


def steps(env: Env) -> int:
    assert env.spec is not None and env.spec.max_episode_steps is not None  # _check_fits
    return env.spec.max_episode_steps


def is_episodic(env: Env) -> bool:
    """Whether it may terminate; of a user's environment, nothing else can be known."""
    return env.spec is None or env.spec.name not in NEVER_TERMINATE


def _flatten(env: Env) -> Env:
    """Observations float32 `[obs]`."""
    space = env.observation_space
    assert isinstance(space, Box)
    with np.errstate(over="ignore"):  # the largest float64 as a bound becomes infinity
        low, high = space.low.astype(np.float32).ravel(), space.high.astype(np.float32).ravel()
    flat = Box(low, high, dtype=np.float32)

    def flatten(obs: Any) -> Array:
        with np.errstate(over="ignore"):  # Guard refuses what becomes infinity
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
