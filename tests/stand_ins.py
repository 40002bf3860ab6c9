"""What tests put in the place of trained models, of noise and of simulators."""

from collections.abc import Mapping
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium.spaces import Box
from torch import Tensor

from tdmpc2.config import PlannerConfig, WorldModelConfig
from tdmpc2.world_model import WorldModel

DISCOUNT = 0.97
BUDGET = PlannerConfig(horizon=2, iterations=3, num_samples=40, num_elites=6, num_pi_trajs=5)
SMALL = dict(enc_dim=16, mlp_dim=24, latent_dim=32, num_q=5, num_bins=21)
KINDS = {
    "plain": WorldModelConfig((5,), 3, **SMALL),
    "episodic": WorldModelConfig((5,), 3, **SMALL, episodic=True),
    "multi-task": WorldModelConfig((5,), 3, **SMALL, num_tasks=3, task_dim=8, action_dims=(3, 1, 2)),
    "both": WorldModelConfig((5,), 3, **SMALL, episodic=True, num_tasks=3, task_dim=8, action_dims=(3, 1, 2)),
}


def nested(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as JSON has them, from those that a user types: `{"planner.horizon": 3}`."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        part, _, last = name.rpartition(".")
        (found.setdefault(part, {}) if part else found)[last] = value
    return found


def random_model(kind: str) -> WorldModel:
    """Weights of such a size that values differ, and that about half of all latents are terminal."""
    torch.manual_seed(1)
    model = WorldModel(KINDS[kind]).eval().requires_grad_(False)
    for name, p in model.named_parameters():
        if "ln." not in name:
            p.normal_(0, 0.3)
    for network in (model.reward_head, model.q):
        network[-1].weight.normal_(0, 0.05)
    if model.config.episodic:
        z, task, _ = latents(model, 99)
        logits = model.termination_logits(z, task)
        model.termination_head[-1].bias.sub_(logits.median())
    return model


def latents(
    model: WorldModel, batch: int, horizon: int = BUDGET.horizon
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Latents, tasks and a warm start."""
    generator = torch.Generator().manual_seed(batch)
    task = torch.arange(batch) % model.config.num_tasks if model.config.num_tasks else None
    obs = torch.randn(batch, *model.config.obs_shape, generator=generator)
    mean = torch.rand(batch, horizon, model.config.action_dim, generator=generator) - 0.5
    return model.encode(obs, task), task, mean


class Silence:
    """A noise source without noise: every row then plans the same whoever is beside it."""

    def normal(self, *shape: int) -> Tensor:
        pattern = torch.linspace(-1, 1, shape[-1] * shape[-2], device="cpu").reshape(shape[-2:])
        return pattern.expand(shape)

    def gumbel(self, *shape: int) -> Tensor:
        return torch.zeros(shape, device="cpu")

    def two_heads(self, num_q: int) -> Tensor:
        return torch.arange(2, device="cpu")


class Tracing:
    """Stands for `library`, without the compiler, which takes half a minute: it runs what would be compiled.

    Tracing finds what cannot be compiled of a function, and what depends on the inputs it was traced with.
    """

    def __init__(self) -> None:
        self.made: dict[str, Any] = {}  # by the names of the libraries

    def __call__(self, name: str, make: Any) -> Any:
        if name not in self.made:
            self.made[name] = make.func.__self__._traced(*make.args)
        return self.made[name]


class Seeded(gym.Env[np.ndarray, np.ndarray]):
    """An episode with an even seed terminates, one with an odd seed is cut off, after 3 to 7 steps."""

    observation_space = Box(-np.inf, np.inf, (24,), np.float32)
    action_space = Box(-1, 1, (6,), np.float32)

    def __init__(self) -> None:
        self.seeds: list[int | None] = []  # of all resets
        self.steps: list[tuple[np.ndarray, np.ndarray]] = []  # observations and actions
        self.closed = False

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.seeds.append(seed)
        self.seed, self.t = -1 if seed is None else seed, 0
        self.x = self.np_random.normal(size=24).astype(np.float32)
        return self.x.copy(), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.steps.append((self.x, np.array(action)))
        self.t += 1
        self.x = (0.9 * self.x + np.resize(action, 24)).astype(np.float32)
        ended, even = self.t == length(self.seed), self.seed % 2 == 0
        return self.x.copy(), float(action[0]), ended and even, ended and not even, {}

    def close(self) -> None:
        self.closed = True


def length(seed: int) -> int:
    return 3 + seed % 5


# A module with a task of a user's own; `FAIL_AT` and the registration are added.
ENVIRONMENT = '''
import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box


class Short(gym.Env):
    """Eight steps; the reward is 1 + the first action; the state drifts with the actions."""

    observation_space = Box(-np.inf, np.inf, (24,), np.float32)
    action_space = Box(-1.0, 1.0, (6,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.state, self.t = self.np_random.normal(size=24).astype(np.float32), 0
        return self.state.copy(), {}

    def step(self, action):
        self.t += 1
        if self.t == FAIL_AT:
            raise RuntimeError("the simulator blew up")
        self.state[:6] += 0.1 * action
        return self.state.copy(), 1.0 + float(action[0]), False, False, {}


'''
