"""MPPI in latent space: latents in, a `Plan` out. Knows the world model and nothing of any agent.

The planner samples action sequences around a Gaussian, scores them by predicted reward plus the value at
the horizon, refits the Gaussian to the best of them (the elites), and finally draws one elite by score
(paper, section 3.2 and appendix). Inside, sequences are laid out `[B, H, N, A]`: the batch of latents, then
time, then the samples of each.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from .config import EAGER, ComputeConfig, PlannerConfig
from .errors import ConfigError
from .inference import FastModel, Origin, Weights
from .world_model.model import WorldModel


class Plan(NamedTuple):
    """One plan for each latent of a batch."""

    actions: Tensor  # [B, H, A], the elite that was drawn, in [-1, 1]
    latents: Tensor  # [B, H+1, L], predicted for these actions; latents[:, 0] is where the plan starts
    mean: Tensor  # [B, H, A], of the final distribution; the next plan's warm start
    std: Tensor  # [B, H, A]
    value: Tensor  # [B], predicted return of `actions`


class NoiseSource:
    """Where all of a planner's randomness comes from; tests put recorded noise in its place."""

    def __init__(self, seed: int, device: torch.device | str = "cpu"):
        self.generator = torch.Generator(device=device).manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, device=self.generator.device)

    def gumbel(self, *shape: int) -> Tensor:
        exponential = torch.empty(*shape, device=self.generator.device)
        return -exponential.exponential_(generator=self.generator).log()

    def two_heads(self, num_q: int) -> Tensor:
        """Two different Q heads `[2]`."""
        order = torch.randperm(num_q, generator=self.generator, device=self.generator.device)
        return order[:2]


def warm_start(mean: Tensor, steps: Tensor) -> Tensor:
    """A plan's mean `[B, H, A]` moved on by the `steps` `[B]` executed since; zeros where it ends."""
    horizon = mean.shape[1]
    index = torch.arange(horizon, device=mean.device) + steps[:, None]
    moved = mean.gather(1, index.clamp(max=horizon - 1)[..., None].expand_as(mean))
    return moved * (index < horizon)[..., None]


def check_budget(config: PlannerConfig) -> None:
    """Raise ConfigError for a planning budget that cannot be."""
    for name in ("horizon", "iterations", "num_samples", "num_elites"):
        if getattr(config, name) < 1:
            raise ConfigError(f"{name}={getattr(config, name)}: must be at least 1")
    for name in ("num_elites", "num_pi_trajs"):
        if not 0 <= getattr(config, name) <= config.num_samples:
            raise ConfigError(
                f"{name}={getattr(config, name)}: must be from 0 to num_samples, {config.num_samples}"
            )


@lru_cache(maxsize=4)
def shared_fast_model(model: WorldModel, discount: float, compute: ComputeConfig) -> FastModel:
    """One `FastModel` for all planners of a model, so that nothing is compiled or copied twice."""
    return FastModel(model, discount, compute)


class Planner:
    """MPPI over a world model.

    Args:
        model: what is planned in.
        config: the planning budget and MPPI's constants.
        discount: per agent step.
        noise: source of all randomness.
        compute: precision, and whether to compile.
    """

    def __init__(
        self,
        model: WorldModel,
        config: PlannerConfig,
        discount: float,
        noise: NoiseSource,
        compute: ComputeConfig = EAGER,
    ):
        check_budget(config)
        self.model, self.config, self.discount, self.noise = model, config, discount, noise
        self.compute, self.fast = compute, shared_fast_model(model, discount, compute)

    @torch.no_grad()
    def plan(
        self,
        z: Tensor,
        mean: Tensor | None = None,
        *,
        eval_mode: bool = True,
        task: Tensor | None = None,
    ) -> Plan:
        """Plan from latents `[B, L]`.

        Args:
            z: where to plan from.
            mean: `[B, H, A]` start of the distribution's mean (see `warm_start`); zeros if None.
            eval_mode: False adds exploration noise to the first action.
            task: `[B]` task indices of a multi-task model.
        """
        c, noise = self.config, self.noise
        batch, action_dim = z.shape[0], self.model.config.action_dim
        num_free = c.num_samples - c.num_pi_trajs
        weights, origin = self.fast.weights(), self.fast.origin(z, task)
        mask = origin.mask[:, None, None]  # [B, 1, 1, A]
        prior = self._policy_trajectories(z, task)  # [B, H, num_pi_trajs, A]
        mean_t = z.new_zeros(batch, c.horizon, 1, action_dim) if mean is None else mean[:, :, None]
        std = torch.full_like(mean_t, c.max_std)
        for _ in range(c.iterations):
            eps = noise.normal(c.horizon, batch, num_free, action_dim).transpose(0, 1)
            actions = torch.cat([prior, (mean_t + std * eps).clamp(-1, 1)], 2) * mask
            value = self.estimate_value(origin, actions, weights).nan_to_num(0.0)  # [B, N]
            elite_value, index = value.topk(c.num_elites, dim=1)
            index = index[:, None, :, None].expand(-1, c.horizon, -1, action_dim)
            elites = actions.gather(2, index)  # [B, H, num_elites, A]
            score = (c.temperature * (elite_value - elite_value[:, :1])).exp()
            score = score / score.sum(1, keepdim=True)  # [B, num_elites]
            weight = score[:, None, :, None]
            mean_t = (weight * elites).sum(2, keepdim=True) / (weight.sum(2, keepdim=True) + 1e-9)
            variance = (weight * (elites - mean_t).square()).sum(2, keepdim=True)
            std = (variance / (weight.sum(2, keepdim=True) + 1e-9)).sqrt()
            std = std.clamp(c.min_std, c.max_std) * mask

        drawn = (score.log() + noise.gumbel(batch, c.num_elites)).argmax(1)
        rows = torch.arange(batch, device=z.device)
        sequence = elites[rows, :, drawn]  # [B, H, A]
        if not eval_mode:
            explored = sequence[:, :1] + std[:, :1, 0] * noise.normal(1, batch, action_dim)[0, :, None]
            sequence = torch.cat([explored, sequence[:, 1:]], 1)
        sequence = sequence.clamp(-1, 1)
        latents = [z]
        for action in sequence.unbind(1):
            latents.append(self.model.next(latents[-1], action, task))
        return Plan(
            actions=sequence,
            latents=torch.stack(latents, 1),
            mean=mean_t[:, :, 0],
            std=std[:, :, 0],
            value=elite_value[rows, drawn],
        )

    def _policy_trajectories(self, z: Tensor, task: Tensor | None) -> Tensor:
        """Action sequences `[B, H, num_pi_trajs, A]` that follow the policy prior."""
        c, model = self.config, self.model
        shape = (c.horizon, z.shape[0], c.num_pi_trajs, model.config.action_dim)
        tasks = None if task is None else task[:, None]  # [B, 1], broadcasts over the samples
        z = z[:, None].repeat(1, c.num_pi_trajs, 1)
        actions: list[Tensor] = []
        for noise in self.noise.normal(*shape):
            if actions:
                z = model.next(z, actions[-1], tasks)
            actions.append(model.pi(z, tasks, noise).action)
        return torch.stack(actions, 1)

    def estimate_value(self, origin: Origin, actions: Tensor, weights: Weights) -> Tensor:
        """Predicted return `[B, N]` of `actions` `[B, H, N, A]`, by two random Q heads."""
        noise = self.noise.normal(actions.shape[0], *actions.shape[2:])
        heads = self.noise.two_heads(self.model.config.num_q)
        return self.fast.score(origin, actions, noise, heads, weights)
