"""The dm_control suite under TD-MPC2's task names.

A name is the domain, a dash, and the task with dashes for underscores: `walker-walk`,
`cartpole-balance-sparse`, `ball_in_cup-catch`. The published short names `cup-catch` and
`pointmass-easy` work too. A lookup ignores case and treats dashes and underscores alike.
"""

import ctypes
import importlib
import importlib.util
import os
import sys
from contextlib import suppress
from functools import cache
from types import ModuleType
from typing import Any

import gymnasium
import numpy as np
from gymnasium.spaces import Box
from numpy.typing import NDArray

from ..errors import EnvironmentFailure

ACTION_REPEAT = 2
EPISODE_STEPS = 500  # agent steps: 1000 control steps, the suite's own episode
ALIASES = {"ball_in_cup": "cup", "point_mass": "pointmass"}
CAMERAS = {"quadruped": 2}  # other domains: camera 0
UNBOUNDED = 1e10  # dm_control's bound of an actuator without bounds (only lqr)


class DmControl(gymnasium.Env[NDArray[np.float32], NDArray[np.float64]]):
    """One suite task without a time limit; each action is held for two control steps.

    Observation: float32 `[obs]`, entries in the task's order (published checkpoints
    depend on it). Action: float64 `[A]` in the actuators' bounds, or [-1, 1] if they have none.
    `render()` returns uint8 `[render_size, render_size, 3]`. `physics` and `task` are dm_control's.
    """

    render_mode = "rgb_array"

    def __init__(self, domain: str, task: str, render_size: int = 384) -> None:
        # No time limit: Gymnasium's TimeLimit adds it. A fixed `random`: lqr samples its model from it;
        # `reset` seeds everything later.
        kwargs = {"time_limit": float("inf"), "random": 0}
        self.env = suite().load(domain, task, task_kwargs=kwargs)
        self.physics, self.task = self.env.physics, self.env.task
        self.camera, self.render_size = CAMERAS.get(domain, 0), render_size
        fps = 1 / (ACTION_REPEAT * self.env.control_timestep())
        self.metadata = {"render_modes": ["rgb_array"], "render_fps": round(fps)}
        # dm_control's tasks inherit a `get_termination` that never terminates.
        self.episodic = type(self.task).get_termination.__qualname__ != "Task.get_termination"

        obs_dim = sum(int(np.prod(s.shape)) for s in self.env.observation_spec().values())
        self.observation_space = Box(-np.inf, np.inf, (obs_dim,), np.float32)
        spec = self.env.action_spec()
        bounded = spec.maximum < UNBOUNDED
        low, high = np.where(bounded, spec.minimum, -1.0), np.where(bounded, spec.maximum, 1.0)
        self.action_space = Box(low, high, dtype=np.float64)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        super().reset(seed=seed)
        if seed is not None:
            self.task.random.seed(seed % 2**32)  # the range of NumPy's RandomState
        return _flatten(self.env.reset().observation), {}

    def step(
        self, action: NDArray[np.float64]
    ) -> tuple[NDArray[np.float32], float, bool, bool, dict[str, Any]]:
        reward = 0.0
        for _ in range(ACTION_REPEAT):
            step = self.env.step(action)
            reward += step.reward
            if step.last():
                break
        return _flatten(step.observation), reward, step.discount == 0, False, {}

    def render(self) -> NDArray[np.uint8]:  # type: ignore[override]
        size = self.render_size
        try:
            return self.physics.render(size, size, camera_id=self.camera)
        except Exception as error:  # each OpenGL platform raises its own errors
            raise _no_rendering(error) from error

    def close(self) -> None:
        self.env.close()


@cache
def tasks() -> dict[str, tuple[str, str]]:
    """Domain and task by every name, the published names first; empty without dm_control."""
    names: dict[str, tuple[str, str]] = {}
    if not is_installed():
        return names
    for domain, task in suite().ALL_TASKS:
        for prefix in dict.fromkeys((ALIASES.get(domain, domain), domain)):
            names[f"{prefix}-{task.replace('_', '-')}"] = (domain, task)
    return names


def is_installed() -> bool:
    """Whether dm_control is installed: pip cannot install its dependencies above Python 3.12."""
    return importlib.util.find_spec("dm_control") is not None


def find(name: object) -> tuple[str, str] | None:
    """Domain and task of a name; None if the suite has no such task, or if it is not a string."""
    return _normalised().get(_normalise(name)) if isinstance(name, str) else None


@cache
def _normalised() -> dict[str, tuple[str, str]]:
    return {_normalise(name): task for name, task in tasks().items()}


def _normalise(name: str) -> str:
    return name.lower().replace("_", "-")


def _flatten(observation: dict[str, Any]) -> NDArray[np.float32]:
    return np.concatenate([np.ravel(v) for v in observation.values()], dtype=np.float32)


@cache
def suite() -> ModuleType:
    """dm_control's suite, imported on first use, because the import selects the renderer.

    Without a display dm_control would select GLFW, which cannot open a window then.

    Triton is imported first: PyTorch imports it when it compiles. Without a graphics driver dm_control loads
    Mesa's LLVM, and a process that loads Triton's LLVM after it crashes.
    """
    displays = ("MUJOCO_GL", "DISPLAY", "WAYLAND_DISPLAY")
    if sys.platform == "linux" and not any(os.environ.get(name) for name in displays):
        os.environ["MUJOCO_GL"] = _headless_backend()
    with suppress(ImportError):  # PyTorch's CPU build comes without it
        importlib.import_module("triton")
    try:
        import dm_control.suite  # type: ignore[import-untyped]
    except Exception as error:  # MUJOCO_GL names a renderer that this machine lacks
        raise _no_rendering(error) from error
    return dm_control.suite


def _headless_backend() -> str:
    for backend, library in (("egl", "libEGL.so.1"), ("osmesa", "libOSMesa.so.8")):
        try:
            ctypes.CDLL(library)
        except OSError:
            continue
        return backend
    return "disabled"


def _no_rendering(error: Exception) -> EnvironmentFailure:
    backend = os.environ.get("MUJOCO_GL", "chosen by dm_control")
    return EnvironmentFailure(
        f"rendering does not work here (MUJOCO_GL: {backend}; {type(error).__name__}): install "
        "libegl1 and set MUJOCO_GL=egl, or libosmesa6 and MUJOCO_GL=osmesa (Debian's package "
        "names); states need no rendering: MUJOCO_GL=disabled"
    )
