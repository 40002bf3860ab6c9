"""What the world model says of other actions than the prior's: a hint at what the planner would find."""

import torch
from torch import Tensor

from .world_model.model import WorldModel

MOVES = 8  # other actions
SIZES = (0.5, 1.0, 0.25, 0.75)  # by how much they differ from the prior's in every entry
COLUMNS = (1, 2, 4, 7, 3, 5, 6)  # of the Hadamard matrix of order 8, which says where up and where down


def moves_of(action_dim: int) -> Tensor:
    """Up or down in every entry `[M, A]`: all moves differ, and each entry goes up as often as down.

    Up to seven entries go up and down independently of one another. With one or two there are not enough
    combinations for all moves, so the others are of other sizes.
    """

    def entry(move: int, j: int) -> float:
        up = (move & COLUMNS[j % len(COLUMNS)]).bit_count() % 2 == 0
        size = SIZES[move >> action_dim]
        return size if up else -size

    return torch.tensor([[entry(move, j) for j in range(action_dim)] for move in range(MOVES)])


def alternatives(model: WorldModel, z: Tensor, moves: Tensor, task: Tensor | None = None) -> Tensor:
    """The prior's action and what moves make of it, `[..., 1 + M, A]`; arguments as of `advantages`."""
    prior = model.prior(z, task)
    action = (prior[..., None, :] + torch.cat([torch.zeros_like(moves[:1]), moves])).clamp(-1, 1)
    return action * model.action_masks[task][..., None, :] if model.config.num_tasks else action


def advantages(
    model: WorldModel,
    z: Tensor,
    moves: Tensor,
    task: Tensor | None = None,
    *,
    discount: float,
    horizon: int,
) -> Tensor:
    """By how much the predicted return changes where the prior's first action is moved, `[..., M]`.

    The return is the planner's (paper, eq. 6), the prior acting after the first step; the mean over all Q
    heads stands for what comes after the horizon.

    Args:
        model: what is looked ahead in.
        z: `[..., L]`.
        moves: `[M, A]`, see `moves_of`.
        task: indices of tasks that broadcast to `[...]`, of a multi-task model.
        discount: per agent step.
        horizon: steps looked ahead; with 0 the Q heads alone are asked.
    """
    action = alternatives(model, z, moves, task)
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
