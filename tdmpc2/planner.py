"""MPPI in latent space: latents in, a `Plan` out. It knows the world model, but no agent.

The planner samples action sequences from a Gaussian, values them by predicted reward plus the value at
the horizon, and refits the Gaussian to the best of them (the elites). After the last iteration it samples
one elite by score (paper, section 3.2 and appendix). Sequences have shape `[B, H, N, A]`: batch of latents,
time, samples.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .config import EAGER, ComputeConfig, PlannerConfig
from .errors import ConfigError
from .inference import (
    AheadOfTime,
    Compiled,
    FastModel,
    FollowedWeights,
    Origin,
    Weights,
    dtype_of,
    origin,
    resolved,
)
from .world_model.model import WorldModel


class Plan(NamedTuple):
    """One plan per latent of a batch."""

    actions: Tensor  # [B, H, A], the sampled plan: one of the elites, in [-1, 1]
    mean: Tensor  # [B, H, A], the mean plan, in [-1, 1]; the next plan's warm start
    std: Tensor  # [B, H, A]
    value: Tensor  # [B], predicted return of `actions`


class NoiseSource:
    """The only source of a planner's randomness; tests replace it with recorded noise."""

    def __init__(self, seed: int, device: torch.device | str = "cpu"):
        try:
            self.generator = torch.Generator(device=device).manual_seed(seed)
        except (TypeError, ValueError, RuntimeError) as e:
            raise ConfigError(f"seed={seed}: must be a whole number of at most 64 bits") from e

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(
            *shape, generator=self.generator, dtype=torch.float32, device=self.generator.device
        )

    def gumbel(self, *shape: int) -> Tensor:
        exponential = torch.empty(*shape, dtype=torch.float32, device=self.generator.device)
        return -exponential.exponential_(generator=self.generator).log()

    def two_heads(self, num_q: int) -> Tensor:
        """Indices of two different Q heads, `[2]`."""
        order = torch.randperm(num_q, generator=self.generator, device=self.generator.device)
        return order[:2]


def warm_start(mean: Tensor, steps: Tensor) -> Tensor:
    """A mean plan `[B, H, A]`, shifted by the `steps` `[B]` executed since; zeros past its end."""
    horizon = mean.shape[1]
    index = torch.arange(horizon, device=mean.device) + steps[:, None]
    moved = mean.gather(1, index.clamp(max=horizon - 1)[..., None].expand_as(mean))
    return moved * (index < horizon)[..., None]


def prior_trajectories(model: WorldModel, z: Tensor, noise: Tensor, task: Tensor | None = None) -> Tensor:
    """Action sequences `[B, H, n, A]` sampled from the policy prior.

    Args:
        model: the world model.
        z: `[B, L]`, where they start.
        noise: `[H, B, n, A]`, standard normal.
        task: `[B]`, task indices of a multi-task model.
    """
    tasks = None if task is None else task[:, None]  # [B, 1], broadcasts over the samples
    z = z[:, None].repeat(1, noise.shape[2], 1)
    actions: list[Tensor] = []
    for noise_now in noise:
        if actions:
            z = model.next(z, actions[-1], tasks)
        actions.append(model.pi(z, tasks, noise_now).action)
    return torch.stack(actions, 1)


class Search(NamedTuple):
    """The state of the search after an iteration."""

    mean: Tensor  # [B, H, 1, A] of the distribution
    std: Tensor  # [B, H, 1, A] of the distribution
    elites: Tensor  # [B, H, num_elites, A]
    value: Tensor  # [B, num_elites], predicted returns of the elites, best first
    score: Tensor  # [B, num_elites], weights of the elites; they sum to one


class Iteration(nn.Module):
    """One iteration of MPPI: sample, value, choose the elites, refit the distribution to them.

    Args:
        config: the planning budget and MPPI's constants.
        fast: the world model.
    """

    def __init__(self, config: PlannerConfig, fast: FastModel):
        super().__init__()
        self.config, self.fast = config, fast

    def forward(
        self,
        at: Origin,
        prior: Tensor,
        mean: Tensor,
        std: Tensor,
        eps: Tensor,
        eps_pi: Tensor,
        *,
        heads: Tensor,
        w: Weights,
    ) -> Search:
        """Sample from the distribution `mean` and `std`, and refit it.

        Args:
            at: where the plans start, from `origin`.
            prior: `[B, H, num_pi_trajs, A]`, samples that follow the policy prior.
            mean, std: `[B, H, 1, A]`, of the other samples.
            eps: `[B, H, num_samples - num_pi_trajs, A]`, standard normal noise of the other samples.
            eps_pi: `[B, num_samples, A]`, standard normal noise of the prior's action at the horizon.
            heads: `[2]`, the Q heads that give the value at the horizon.
            w: the model's weights.
        """
        c, mask = self.config, at.mask[:, None, None]  # [B, 1, 1, A]
        actions = torch.cat([prior, (mean + std * eps).clamp(-1, 1)], 2) * mask  # [B, H, N, A]
        value = self.fast.score(at, actions, mean, eps_pi, heads, w).nan_to_num(0.0)  # [B, N]
        value, index = value.topk(c.num_elites, dim=1)
        index = index[:, None, :, None].expand(-1, c.horizon, -1, mean.shape[-1])
        elites = actions.gather(2, index)  # [B, H, num_elites, A]
        score = (c.temperature * (value - value[:, :1])).exp()
        score = score / score.sum(1, keepdim=True)  # [B, num_elites]
        weight = score[:, None, :, None]
        total = weight.sum(2, keepdim=True) + 1e-9
        mean = (weight * elites).sum(2, keepdim=True) / total
        variance = (weight * (elites - mean).square()).sum(2, keepdim=True) / total
        std = variance.sqrt().clamp(c.min_std, c.max_std) * mask
        return Search(mean, std, elites, value, score)


@lru_cache(maxsize=4)
def shared(
    model: WorldModel, config: PlannerConfig, discount: float, compute: ComputeConfig
) -> tuple[Iteration, Callable[..., Search], FollowedWeights]:
    """An iteration, the same compiled (if `compute` says so), and the model's weights.

    All planners of a model share them, so nothing is compiled or copied twice.
    """
    device, what = next(model.parameters()).device, "the planner"
    dtype = dtype_of(compute, device)
    run: Callable[..., Search]
    run = iteration = Iteration(config, FastModel(model.config, discount, dtype))
    if compute.compile and device.type == "cpu":
        run = AheadOfTime(iteration, Search._make, what=what)
    elif compute.compile:
        run = Compiled(iteration, what=what, device=device, cuda_graphs=device.type == "cuda")
    return iteration, run, FollowedWeights(model, dtype)


class Planner:
    """MPPI over a world model.

    Args:
        model: predicts latents, rewards and values.
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
        self.model, self.config, self.discount, self.noise = model, config, discount, noise
        self.compute = compute = resolved(compute, next(model.parameters()).device)
        alike = replace(config, iterations=1)
        self.iteration, self._run, self._weights = shared(model, alike, discount, compute)

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
            z: the latents.
            mean: `[B, H, A]`, the first mean of the distribution, from `warm_start`; None: zeros.
            eval_mode: False adds exploration noise to the first action.
            task: `[B]` task indices of a multi-task model.
        """
        c, noise = self.config, self.noise
        batch, action_dim = z.shape[0], self.model.config.action_dim
        weights, at = self._weights(), origin(self.model, z, task)
        prior = prior_trajectories(
            self.model, z, noise.normal(c.horizon, batch, c.num_pi_trajs, action_dim), task
        )
        start = z.new_zeros(batch, c.horizon, action_dim) if mean is None else mean
        mean, std = start[:, :, None], torch.full_like(start, c.max_std)[:, :, None]
        for _ in range(c.iterations):
            eps = noise.normal(c.horizon, batch, c.num_samples - c.num_pi_trajs, action_dim).transpose(0, 1)
            eps_pi = noise.normal(batch, c.num_samples, action_dim)
            heads = noise.two_heads(self.model.config.num_q)
            mean, std, elites, value, score = self._run(
                at, prior, mean, std, eps, eps_pi, heads=heads, w=weights
            )

        drawn = (score.log() + noise.gumbel(batch, c.num_elites)).argmax(1)
        rows = torch.arange(batch, device=z.device)
        sequence = elites[rows, :, drawn]  # [B, H, A]
        if not eval_mode:
            explored = sequence[:, :1] + std[:, :1, 0] * noise.normal(1, batch, action_dim)[0, :, None]
            sequence = torch.cat([explored, sequence[:, 1:]], 1)
        return Plan(
            actions=sequence.clamp(-1, 1),
            mean=mean[:, :, 0],
            std=std[:, :, 0],
            value=value[rows, drawn],
        )
