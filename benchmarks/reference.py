"""The plain planner: MPPI straight from the paper, written for clarity and in no hurry.

One latent at a time, eager, float32, every Q head evaluated and two of them used. The benchmarks measure
how much faster the planner is than this, and the tests take it for an oracle. It asks for its noise in
the same order as the planner does.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from tdmpc2.config import PlannerConfig
from tdmpc2.planner import NoiseSource
from tdmpc2.world_model import WorldModel


class ReferencePlan(NamedTuple):
    actions: Tensor  # [H, A]
    mean: Tensor  # [H, A]
    std: Tensor  # [H, A]
    value: Tensor  # [], predicted return of `actions`


@torch.no_grad()
def reference_plan(
    model: WorldModel,
    config: PlannerConfig,
    discount: float,
    noise: NoiseSource,
    z: Tensor,
    mean: Tensor | None = None,
    task: Tensor | None = None,
) -> ReferencePlan:
    """Plan from one latent `[L]`, the distribution's mean starting at `mean` `[H, A]` or zero.

    `task` `[]` is the index of a multi-task model's task.
    """
    c, action_dim = config, model.config.action_dim
    mask = torch.ones(action_dim) if task is None else model.action_masks[task]
    mean = torch.zeros(c.horizon, action_dim) if mean is None else mean
    std = torch.full((c.horizon, action_dim), c.max_std)
    actions = torch.zeros(c.horizon, c.num_samples, action_dim)

    eps = noise.normal(c.horizon, c.num_pi_trajs, action_dim)
    z_pi = z.repeat(c.num_pi_trajs, 1)
    for t in range(c.horizon):
        actions[t, : c.num_pi_trajs] = model.pi(z_pi, task, eps[t]).action
        z_pi = model.next(z_pi, actions[t, : c.num_pi_trajs], task)

    for _ in range(c.iterations):
        eps = noise.normal(c.horizon, c.num_samples - c.num_pi_trajs, action_dim)
        actions[:, c.num_pi_trajs :] = (mean[:, None] + std[:, None] * eps).clamp(-1, 1)
        actions = actions * mask
        value = _estimate_value(model, discount, noise, z.repeat(c.num_samples, 1), actions, task)
        elite = value.nan_to_num(0.0).topk(c.num_elites)
        elite_actions = actions[:, elite.indices]  # [H, num_elites, A]
        score = (c.temperature * (elite.values - elite.values.max())).exp()
        score = score / score.sum()
        weight = score[None, :, None] / (score.sum() + 1e-9)
        mean = (weight * elite_actions).sum(1)
        std = (weight * (elite_actions - mean[:, None]) ** 2).sum(1).sqrt()
        std = std.clamp(c.min_std, c.max_std) * mask

    drawn = (score.log() + noise.gumbel(c.num_elites)).argmax()
    return ReferencePlan(elite_actions[:, drawn].clamp(-1, 1), mean, std, elite.values[drawn])


def _estimate_value(
    model: WorldModel,
    discount: float,
    noise: NoiseSource,
    z: Tensor,
    actions: Tensor,
    task: Tensor | None,
) -> Tensor:
    """Predicted return `[N]` of `actions` `[H, N, A]` from `z` `[N, L]` (paper, eq. 6)."""
    total, factor = torch.zeros(z.shape[0]), torch.ones(z.shape[0])
    for action in actions:
        total = total + factor * model.reward(z, action, task)
        z = model.next(z, action, task)
        factor = factor * discount
        if model.config.episodic:
            factor = factor * (model.termination(z, task) <= 0.5)
    action = model.pi(z, task, noise.normal(*actions.shape[1:])).action
    all_heads = model.value(z, action, task)  # [num_q, N]
    return total + factor * all_heads[noise.two_heads(model.config.num_q)].mean(0)
