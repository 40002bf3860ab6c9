"""What the world model says of other actions than the prior's: a hint at what the planner would find."""

import torch
from torch import Tensor

from .world_model.model import WorldModel

OFFSETS = (-1.0, -0.3, 0.3, 1.0)  # from the prior's action, in one entry at a time


def alternatives(prior: Tensor, model: WorldModel, task: Tensor | None = None) -> Tensor:
    """The prior's action `[..., A]` and those that differ from it in one entry, `[..., 1 + O A, A]`."""
    one = torch.eye(prior.shape[-1], device=prior.device)
    moves = torch.cat([torch.zeros_like(one[:1]), *(offset * one for offset in OFFSETS)])
    action = (prior[..., None, :] + moves).clamp(-1, 1)
    return action * model.action_masks[task][..., None, :] if model.config.num_tasks else action


def advantages(
    model: WorldModel, z: Tensor, task: Tensor | None = None, *, discount: float, horizon: int
) -> Tensor:
    """By how much the predicted return changes where one entry of the prior's action is moved, `[..., O A]`.

    The return is the planner's (paper, eq. 6), the prior acting after the first step; the mean over all Q
    heads stands for what comes after the horizon.

    Args:
        model: what is looked ahead in.
        z: `[..., L]`.
        task: indices of tasks that broadcast to `[...]`, of a multi-task model.
        discount: per agent step.
        horizon: steps looked ahead; with 0 the Q heads alone are asked.
    """
    action = alternatives(model.prior(z, task), model, task)
    z = z[..., None, :].expand(*action.shape[:-1], -1)
    tasks = None if task is None else task[..., None]
    total, weight = torch.zeros_like(z[..., 0]), torch.ones_like(z[..., 0])
    for _ in range(horizon):
        total = total + weight * model.reward(z, action, tasks)
        z = model.next(z, action, tasks)
        weight = weight * discount
        if model.config.episodic:  # nothing counts after a state that is predicted to be terminal
            weight = weight * (model.termination(z, tasks) <= 0.5)
        action = model.prior(z, tasks)
    total = total + weight * model.value(z, action, tasks).mean(0)
    return total[..., 1:] - total[..., :1]
