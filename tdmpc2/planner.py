"""MPPI in latent space: latents in, a `Plan` out. Knows the world model and nothing of any agent.

The planner samples action sequences around a Gaussian, scores them by predicted reward plus the value at
the horizon, refits the Gaussian to the best of them (the elites), and finally draws one elite by score
(paper, section 3.2 and appendix). Inside, sequences are laid out `[B, H, N, A]`: the batch of latents, then
time, then the samples of each.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .config import EAGER, ComputeConfig, PlannerConfig
from .errors import ConfigError
from .inference import AheadOfTime, Compiled, FastModel, FollowedWeights, Origin, Weights, dtype_of, origin
from .world_model.model import WorldModel


class Plan(NamedTuple):
    """One plan for each latent of a batch."""

    actions: Tensor  # [B, H, A], the elite that was drawn, in [-1, 1]
    mean: Tensor  # [B, H, A], of the final distribution, in [-1, 1]; the next plan's warm start
    std: Tensor  # [B, H, A]
    value: Tensor  # [B], predicted return of `actions`


class NoiseSource:
    """Where all of a planner's randomness comes from; tests put recorded noise in its place."""

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
        """Two different Q heads `[2]`."""
        order = torch.randperm(num_q, generator=self.generator, device=self.generator.device)
        return order[:2]


def warm_start(mean: Tensor, steps: Tensor) -> Tensor:
    """A plan's mean `[B, H, A]` moved on by the `steps` `[B]` executed since; zeros where it ends."""
    horizon = mean.shape[1]
    index = torch.arange(horizon, device=mean.device) + steps[:, None]
    moved = mean.gather(1, index.clamp(max=horizon - 1)[..., None].expand_as(mean))
    return moved * (index < horizon)[..., None]


class Search(NamedTuple):
    """Where the search for a plan stands after an iteration."""

    mean: Tensor  # [B, H, 1, A] of the distribution, as is `std`
    std: Tensor
    elites: Tensor  # [B, H, num_elites, A]
    value: Tensor  # [B, num_elites], predicted returns of the elites, the best first
    score: Tensor  # [B, num_elites], their weights, which sum to one


class Iteration(nn.Module):
    """One iteration of MPPI: sample, evaluate, choose the elites, and refit the distribution to them.

    Args:
        config: the planning budget and MPPI's constants.
        fast: the model that is planned in.
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
        """Search around the distribution `mean` and `std` `[B, H, 1, A]`.

        Args:
            at: where plans start, from `origin`.
            prior: `[B, H, num_pi_trajs, A]`, action sequences that are samples as well.
            mean, std: of the other samples.
            eps: `[B, H, num_samples - num_pi_trajs, A]`, their noise, standard normal.
            eps_pi: `[B, num_samples, A]`, standard normal, of the policy's action at the horizon.
            heads: `[2]`, the Q heads that judge.
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
    """What all planners of a model share, so that nothing is compiled or copied twice.

    An iteration, the same compiled if it is to be, and the model's weights.
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
        self.model, self.config, self.discount, self.noise = model, config, discount, noise
        self.compute = compute
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
            z: where to plan from.
            mean: `[B, H, A]` start of the distribution's mean (see `warm_start`); zeros if None.
            eval_mode: False adds exploration noise to the first action.
            task: `[B]` task indices of a multi-task model.
        """
        c, noise = self.config, self.noise
        batch, action_dim = z.shape[0], self.model.config.action_dim
        weights, at = self._weights(), origin(self.model, z, task)
        prior = self._policy_trajectories(z, task)
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
