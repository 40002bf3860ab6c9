"""An environment padded to the shapes of a multi-task model."""

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box


class PadForModel(gym.ObservationWrapper):
    """Pads observations with zeros, and cuts actions to the task's own entries.

    Args:
        env: with observations `[n]` and actions `[a]`.
        obs_dim: at least n.
        action_dim: at least a.
    """

    def __init__(self, env: gym.Env, obs_dim: int, action_dim: int):
        super().__init__(env)
        assert env.observation_space.shape and env.action_space.shape
        self.own_obs, self.own_action = env.observation_space.shape[0], env.action_space.shape[0]
        self.observation_space = Box(-np.inf, np.inf, (obs_dim,), np.float32)
        self.action_space = Box(-1.0, 1.0, (action_dim,), np.float32)

    def observation(self, observation: np.ndarray) -> np.ndarray:
        return np.pad(observation, (0, self.observation_space.shape[0] - self.own_obs))  # type: ignore[index]

    def step(self, action: np.ndarray):  # type: ignore[no-untyped-def]
        return super().step(action[: self.own_action])
