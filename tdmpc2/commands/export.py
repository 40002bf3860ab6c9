"""Export an agent to ONNX: tdmpc2 export FOLDER out=FOLDER.

The folder holds graphs, a manifest that describes them, and `run.py`, a program that acts as the agent and
needs NumPy and ONNX Runtime only. `python run.py` in it repeats recorded steps of the PyTorch agent.
"""

import sys
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import gymnasium as gym
import numpy as np

from ..agent import SpeculativeAgent
from ..checked import Checked, at_least
from ..config import EAGER, TEACHER, ModelOverride, WorldModelConfig
from ..envs import PadForModel, make_env
from ..errors import TaskError
from ..export import Act, Observe, check_out, check_packages, export
from ..loading import load_agent
from ..world_model.checkpoint import read_config


@dataclass(frozen=True, kw_only=True)
class Settings(Checked):
    """The agent, and where to write it."""

    agent: str  # an accelerated agent, a teacher or an original .pt file; `agent=` may be left out
    out: str  # folder to write; missing, empty, or an exported agent
    overwrite: bool = False  # replace an exported agent in `out`
    task: str | None = None  # None: the agent's own
    steps: int = 60  # of the PyTorch agent to record, for the check of `run.py`
    seed: int = 1000  # of the recorded steps
    model: ModelOverride = field(default_factory=ModelOverride)

    def check_ranges(self) -> None:
        at_least(3, self, "steps")
        at_least(0, self, "seed")


def main(settings: Settings) -> None:
    s = settings
    check_packages()
    check_out(s.out, s.overwrite)
    agent = load_agent(s.agent, task=s.task, seed=s.seed, compute=EAGER, **s.model.unsaid())
    if not isinstance(agent, SpeculativeAgent):
        agent = SpeculativeAgent(agent, TEACHER)
    task = s.task or read_config(s.agent).get("task")
    observe = _observer(task, agent.teacher.model.config)
    done = export(agent, s.out, observe, task=task, steps=s.steps, seed=s.seed, overwrite=s.overwrite)
    for name, size in done.sizes.items():
        print(f"{Path(s.out) / name}: {size / 1e6:.2f} MB")
    print(
        f"{done.steps} recorded steps with {done.plans} plans: the actions of the exported agent differ by "
        f"at most {done.difference:.1e}"
    )


def _observer(task: str | None, config: WorldModelConfig) -> Observe:
    """Runs episodes of the task, or of random observations if it has no environment here."""
    try:
        if task is None:
            raise TaskError("the agent does not name its task")
        make_env(task, obs="rgb" if config.pixels else "state").close()
    except TaskError as e:
        print(f"random observations are recorded: {e}", file=sys.stderr)
        return random_observations(config)

    def observe(seed: int, steps: int, act: Act) -> None:
        env: gym.Env = make_env(task, obs="rgb" if config.pixels else "state")
        if config.num_tasks:
            env = PadForModel(env, config.obs_shape[0], config.action_dim)
        with closing(env):
            obs, _ = env.reset(seed=seed)
            for _ in range(steps):
                obs, _, terminated, truncated, _ = env.step(act(obs))
                if terminated or truncated:
                    obs, _ = env.reset()

    return observe


def random_observations(config: WorldModelConfig) -> Observe:
    """Random observations that change slowly, so that plans are followed."""

    def observe(seed: int, steps: int, act: Act) -> None:
        rng = np.random.default_rng(seed)
        x = rng.normal(size=config.obs_shape)
        for _ in range(steps):
            act((128 + 40 * x).clip(0, 255).astype(np.uint8) if config.pixels else x.astype(np.float32))
            x += 0.02 * rng.normal(size=config.obs_shape)

    return observe
