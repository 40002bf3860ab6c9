"""Refining an action: a search far smaller than planning.

Planning searches iteratively over hundreds of action sequences. Near a good action, one iteration over a few
actions does much of the same work. Looking one step ahead is cheapest. Looking H steps ahead is better where
the Q heads alone value actions poorly.
"""

import torch
from torch import Tensor

from .world_model.model import WorldModel

SAMPLES = 14  # with the two given actions, 16 rows of a matrix product: fast on CPUs
STD = 0.15  # of each sample entry, in units of actions in [-1, 1]


def offsets(action_dim: int) -> Tensor:
    """Offsets `[N, A]` of the samples around an action: fixed, in pairs of opposite sign."""
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

    The samples are `action`, the planned action, and actions around `action`. The policy prior follows each,
    and the mean of all Q heads values it `steps` ahead; for one step, `r(z, a) + gamma Q(z', p(z'))`. The
    refined action is the mean of the elites, the best quarter, weighted by value.

    Args:
        model: values actions.
        z: `[B, L]`, latents.
        action: `[B, A]`, to be refined.
        planned: `[B, A]`.
        around: `[N, A]`, from `offsets`.
        task: `[B]`, task indices of a multi-task model.
        steps: at least 1.
        discount: per agent step.
        temperature: of the weights, as in MPPI.
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
        if model.config.episodic:  # nothing counts after the first latent predicted terminal
            later = later * (model.termination(z, task) <= 0.5).to(value)
    value = value + later * model.value(z, next_action, task).mean(0)
    best = value.nan_to_num(0.0).topk(samples.shape[1] // 4, 1)
    weight = (temperature * best.values).softmax(1)
    elites = samples.gather(1, best.indices[..., None].expand(-1, -1, samples.shape[2]))
    return (weight[..., None] * elites).sum(1)
