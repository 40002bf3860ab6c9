"""An environment of your own: register it, check it, act in it.

    python examples/own_environment.py

This file defines a task, a point that is pushed to a target, and registers it with Gymnasium. Everything that
the package needs is in the class below. The teacher here is untrained, so that the example is fast: it shows
that all parts fit. Then train one, and accelerate it, from the folder of this file:

    tdmpc2 train task=own_environment:PointMass-v0 model_size=1 steps=20000
    tdmpc2 accelerate task=own_environment:PointMass-v0 checkpoint=runs/own_environment-PointMass-v0/1/teacher
"""

import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box
from numpy.typing import NDArray

import tdmpc2
from tdmpc2.config import MODEL_SIZES, ComputeConfig, PlannerConfig, SpeculationConfig, WorldModelConfig
from tdmpc2.world_model import save_world_model

TASK = "PointMass-v0"
EPISODE_STEPS = 100
SIZE = 96  # pixels of a picture

Floats = NDArray[np.float32]


class PointMass(gym.Env[Floats, Floats]):
    """Push a point to a target.

    Observation: float32 `[6]`, position, velocity and target. Action: float32 `[2]`, a force in newtons.
    """

    # Box observations, and Box actions with finite bounds. The package scales actions from [-1, 1].
    observation_space = Box(-np.inf, np.inf, (6,), np.float32)
    action_space = Box(-2.0, 2.0, (2,), np.float32)
    # `tdmpc2 play` shows pictures where render_mode is "rgb_array".
    metadata = {"render_modes": ["rgb_array"], "render_fps": 20}  # noqa: RUF012

    def __init__(self, render_mode: str | None = None) -> None:
        self.render_mode = render_mode

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Floats, dict[str, Any]]:
        super().reset(seed=seed)  # an episode is a function of its seed: draw from self.np_random only
        self.position, self.target = self.np_random.uniform(-1, 1, (2, 2))
        self.velocity = np.zeros(2)
        return self._observation(), {}

    def step(self, action: Floats) -> tuple[Floats, float, bool, bool, dict[str, Any]]:
        self.velocity = 0.95 * self.velocity + 0.05 * action
        self.position = np.clip(self.position + 0.05 * self.velocity, -1.5, 1.5)
        reward = float(np.exp(-4 * np.sum((self.position - self.target) ** 2)))
        # terminated, truncated: the time limit belongs to the registration, not to the environment.
        return self._observation(), reward, False, False, {}

    def render(self) -> NDArray[np.uint8]:  # type: ignore[override]
        picture = np.full((SIZE, SIZE, 3), 255, np.uint8)
        for place, colour in ((self.target, (90, 164, 105)), (self.position, (59, 111, 182))):
            x, y = ((place + 1.5) / 3 * (SIZE - 1)).round().astype(int)
            picture[max(y - 3, 0) : y + 4, max(x - 3, 0) : x + 4] = colour
        return picture

    def _observation(self) -> Floats:
        return np.concatenate([self.position, self.velocity, self.target]).astype(np.float32)


# At import, so that `task=own_environment:PointMass-v0` finds it. `max_episode_steps` is required.
gym.register(
    TASK,
    entry_point=f"{__name__}:PointMass",
    max_episode_steps=EPISODE_STEPS,
    kwargs={"render_mode": "rgb_array"},
)


def untrained_teacher(folder: Path) -> None:
    """Write a teacher for the task, with random weights, as `tdmpc2 train` writes a trained one."""
    shapes = WorldModelConfig(PointMass.observation_space.shape, PointMass.action_space.shape[0])
    model = tdmpc2.WorldModel(WorldModelConfig(**{**asdict(shapes), **MODEL_SIZES[1]}))
    budget = PlannerConfig(num_samples=64, iterations=2, num_elites=8, num_pi_trajs=8)
    save_world_model(folder, model, task=TASK, discount=0.95, planner=asdict(budget))


def run(agent: tdmpc2.TDMPC2 | tdmpc2.SpeculativeAgent, steps: int) -> tuple[float, int]:
    """The sum of rewards of an episode, and the number of steps that planned."""
    env = tdmpc2.make_env(TASK, seed=0)  # raises with a plain sentence where the environment does not fit
    obs, _ = env.reset()
    agent.reset()
    total, plans = 0.0, 0
    for _ in range(steps):
        obs, reward, terminated, truncated, _ = env.step(agent.act(obs))
        assert agent.info is not None
        total += float(reward)
        plans += agent.info.kinds[0] in (tdmpc2.Kind.PLANNED, tdmpc2.Kind.FALLBACK)
        if terminated or truncated:
            break
    picture = env.render()
    assert isinstance(picture, np.ndarray) and picture.shape == (SIZE, SIZE, 3)
    env.close()
    return total, plans


def main(steps: int = EPISODE_STEPS) -> None:
    with tempfile.TemporaryDirectory() as folder:
        untrained_teacher(Path(folder))
        compute = ComputeConfig(compile=False)  # compiling pays from a few hundred steps on
        teacher = tdmpc2.load_agent(folder, compute=compute)
        print("replanning at every step: reward {:.1f}, {} plans".format(*run(teacher, steps)))
        # One mode of execution. `tdmpc2 accelerate` trains correctors and chooses the mode.
        teacher = tdmpc2.load_agent(folder, compute=compute)
        assert isinstance(teacher, tdmpc2.TDMPC2)
        agent = tdmpc2.SpeculativeAgent(teacher, SpeculationConfig(execution_horizon=3))
        print("three steps a plan:       reward {:.1f}, {} plans".format(*run(agent, steps)))


if __name__ == "__main__":
    main()
