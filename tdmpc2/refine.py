"""Refining an action by a search that is far smaller than a plan.

A plan is an iterated search over hundreds of sequences of actions. Where a good action is known already, one
iteration over a few actions around it does much of the same. Judged a single step ahead it is cheapest; where
the Q heads alone are a poor judge, as far as a plan looks is better.
"""

import torch
from torch import Tensor

from .world_model.model import WorldModel

SAMPLES, ELITES = 14, 4  # with the two others these are 16 rows of a matrix product, which suits CPUs
STD = 0.15  # of an entry of the samples


def offsets(action_dim: int) -> Tensor:
    """What is added to an action to get samples `[N, A]`: always the same, each with its opposite."""
    generator = torch.Generator().manual_seed(0)
    half = torch.randn(SAMPLES // 2, action_dim, generator=generator, dtype=torch.float32, device="cpu")
    return STD * torch.cat([half, -half])


def refine(
    model: WorldModel,
    z: Tensor,
    action: Tensor,
    planned: Tensor,
    around: Tensor,
    task: Tensor | None = None,
    *,
    steps: int,
    discount: float,
    temperature: float,
) -> Tensor:
    """One iteration of MPPI (paper, eq. 5) on the action of one step, `[B, A]`.

    Samples lie around `action`; itself and the planned action are samples too. Each is followed by the policy
    prior and valued `steps` ahead, with one `r(z, a) + gamma Q(z', p(z'))`, by the mean of all Q heads. The
    answer is the mean of the elites, weighted by value.

    Args:
        model: judges.
        z: `[B, L]`, latents.
        action: `[B, A]`, to be refined.
        planned: `[B, A]`.
        around: `[N, A]`, from `offsets`.
        task: `[B]`, indices of tasks, of a multi-task model.
        steps: at least 1.
        discount: per agent step.
        temperature: of the weights, MPPI's.
    """
    given = torch.stack([action, planned], 1)
    samples = torch.cat([given, (action[:, None] + around).clamp(-1, 1)], 1)  # [B, 2 + N, A]
    if task is not None:
        samples = samples * model.action_masks[task][:, None]
        task = task[:, None]
    z = z[:, None].expand(-1, samples.shape[1], -1)
    next_action, value = samples, torch.zeros_like(samples[..., 0])
    later: float | Tensor = 1.0
    for _ in range(steps):
        value = value + later * model.reward(z, next_action, task)
        z = model.next(z, next_action, task)
        next_action = model.prior(z, task)
        later = later * discount
        if model.config.episodic:  # nothing counts after the first latent predicted to be terminal
            later = later * (model.termination(z, task) <= 0.5).to(value)
    value = value + later * model.value(z, next_action, task).mean(0)
    best = value.nan_to_num(0.0).topk(ELITES, 1)
    weight = (temperature * best.values).softmax(1)
    elites = samples.gather(1, best.indices[..., None].expand(-1, -1, samples.shape[2]))
    return (weight[..., None] * elites).sum(1)
