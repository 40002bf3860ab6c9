"""The outermost wrapper of every environment: it turns every fault into one named error."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import gymnasium
import numpy as np
from gymnasium.utils import RecordConstructorArgs
from numpy.typing import NDArray

from ..errors import EnvironmentFailure, ObservationError, TDMPC2Error

Array = NDArray[Any]
Env = gymnasium.Env[Array, Array]


@contextmanager
def closed_on_error(env: gymnasium.Env) -> Iterator[None]:
    """Close `env` if the body raises."""
    try:
        yield
    except BaseException:
        env.close()
        raise


class Guard(gymnasium.Wrapper[Array, Array, Array, Array], RecordConstructorArgs):
    """Outermost wrapper: it checks observations and rewards, and knows the task.

    The first `reset()` without a seed uses the constructor's seed. Observations are copies.

    Raises:
        EnvironmentFailure: the environment raised, called `sys.exit`, gave a reward that is not finite, or
            was stepped outside an episode.
        ObservationError: an observation is not finite, or does not match the observation space.
    """

    def __init__(self, env: Env, task: str, seed: int, steps: int, episodic: bool) -> None:
        # lets Gymnasium rebuild the environment from its `spec`
        RecordConstructorArgs.__init__(self, task=task, seed=seed, steps=steps, episodic=episodic)
        gymnasium.Wrapper.__init__(self, env)
        self.task = task
        self.max_episode_steps = steps
        self.episodic = episodic
        self._seed: int | None = seed
        self._step: int | None = None  # of the running episode; None outside an episode
        self.action_space.seed(seed)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Array, dict[str, Any]]:
        seed, self._seed = self._seed if seed is None else seed, None
        self._step = None
        try:
            obs, info = self.env.reset(seed=seed, options=options)
        except (Exception, SystemExit) as error:
            raise self._failure("reset", error) from error
        self._step = 0
        return self._checked(obs), info

    def step(self, action: Array) -> tuple[Array, float, bool, bool, dict[str, Any]]:
        if self._step is None:
            raise EnvironmentFailure(f"{self.task}: no episode is running, call reset() first")
        self._step += 1
        try:
            obs, reward, terminated, truncated, info = self.env.step(action)
            reward = float(np.asarray(reward).item())  # an array of one entry counts as a number
            terminated, truncated = bool(terminated), bool(truncated)
        except (Exception, SystemExit) as error:
            raise self._failure(f"step {self._step}", error) from error
        if not math.isfinite(reward):
            raise EnvironmentFailure(f"{self.task}: the reward at step {self._step} is {reward}")
        obs = self._checked(obs)
        if terminated or truncated:
            self._step = None
        return obs, reward, terminated, truncated, info

    def close(self) -> None:
        try:
            self.env.close()
        except (Exception, SystemExit) as error:
            raise self._failure("close", error) from error

    def _checked(self, obs: Array) -> Array:
        obs = np.array(obs)  # a copy: some environments reuse one buffer
        space = self.observation_space
        if obs.shape != space.shape or obs.dtype != space.dtype:
            raise ObservationError(
                f"{self.task}: the observation at step {self._step} is {obs.dtype} "
                f"{list(obs.shape)}, expected {space.dtype} {list(space.shape or ())}"
            )
        if obs.dtype != np.uint8 and not np.isfinite(obs).all():
            i = np.flatnonzero(~np.isfinite(obs))[0]
            raise ObservationError(
                f"{self.task}: entry {i} of the observation at step {self._step} is {obs[i]}"
            )
        return obs

    def _failure(self, where: str, error: BaseException) -> TDMPC2Error:
        self._step = None
        if isinstance(error, TDMPC2Error):
            return type(error)(f"{self.task}: {error}")
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        if "values to unpack" in reason:
            reason += "; reset returns (obs, info), step (obs, reward, terminated, truncated, info)"
        return EnvironmentFailure(f"{self.task}: the environment failed at {where}: {reason}")
