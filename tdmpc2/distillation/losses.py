"""The training loss of a corrector: segments of recorded episodes, replayed as the agent would act.

`unroll` is `SpeculativeAgent` on recorded states, without refining. A segment starts at a step `t0` with
its plan. The corrector acts at `t0 + 1 ... t0 + S`; its history contains steps of earlier plans:

    step              t0-4  t0-3  t0-2  t0-1    t0   t0+1  t0+2  t0+3        with plans of
    made at           t0-6  t0-3  t0-3  t0-3    t0    t0    t0    t0         3 steps before t0
    k                  2     0     1     2      0     1     2     3
    executed          teacher plan teacher ...  plan  corrector ...

The number of steps executed per earlier plan is sampled for every segment, because execution horizons and
fallbacks vary it. Earlier plans are corrected to the teacher's actions. Real latents are recorded; predicted
latents follow the corrector's actions. Gradients flow through these actions only, not through predicted
latents: recorded latents do not react to other actions either. The agent also refines its actions; here the
corrector must find the planner's choice alone.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ..corrector import BaseCorrector, History
from ..world_model.model import WorldModel
from .dataset import Recording


class Unrolled(NamedTuple):
    """Steps `k = 1 ... S` of a batch of segments."""

    action: Tensor  # [S, B, A], the corrector's
    planned: Tensor  # [S, B, A]
    teacher: Tensor  # [S, B, A]
    inside: Tensor  # [S, B] bool, False past the end of the episode


def unroll(
    model: WorldModel,
    corrector: BaseCorrector,
    data: Recording,
    start: Tensor,
    earlier: Tensor,
    steps: int,
    *,
    own_actions: bool = True,
) -> Unrolled:
    """Replay segments.

    Args:
        model: the teacher's world model.
        corrector: in training mode for gradients.
        data: the recorded steps.
        start: `[B]`, first steps of the segments.
        earlier: `[B]`, steps executed per plan before `start`, at least 1.
        steps: number `S` of steps after the first; past the planning horizon the prior plans.
        own_actions: predicted latents follow the corrector's actions; False: the plan's.
    """
    horizon, task, window = data.plan.shape[1], data.task, corrector.window
    first, last = data.first[start], data.last[start]
    # The oldest step in the window may be the last of a plan: replay from the start of that plan.
    before = 0 if window == 1 else window - 1 + int(earlier.max()) - 1
    at = start + torch.arange(-before, steps + 1, device=start.device)[:, None]
    inside, at = (at >= first) & (at <= last), at.clamp(min=0, max=len(data.latent) - 1)
    z, teacher = data.latent[at], data.teacher_action[at]
    z_pred, plan_at = z[before], start
    replayed = []
    with torch.no_grad():  # no gradients between steps
        prior, history = model.prior(z, task), corrector.no_history(len(start))
        for i in range(-before, steps + 1):
            t = i + before
            if i <= 0:
                fresh = ((-i) % earlier == 0) | (at[t] == first)
                plan_at = torch.where(fresh, at[t], plan_at)
                z_pred = torch.where(fresh[:, None], z[t], z_pred)
            k = (at[t] - plan_at).clamp(min=0)
            planned = data.plan[plan_at, k.clamp(max=horizon - 1)]
            planned = torch.where((k < horizon)[:, None], planned, prior[t])
            replayed.append((z_pred, planned, k))
            if i == steps:
                break
            if own_actions and i > -window:
                history = history.then(corrector.embed(z[t], z_pred, planned, k))
                history.valid[:, -1] = inside[t]
            if i <= 0:
                executed = torch.where((k == 0)[:, None], planned, teacher[t])
            else:
                executed = corrector(history, planned) if own_actions else planned
            z_pred = model.next(z_pred, executed, task)
    # Embed each step of the windows once; then call the corrector once for all steps.
    held, answers = slice(-(window + steps), None), slice(-steps, None)
    z_preds, planneds, ks = (torch.stack(x) for x in zip(*replayed, strict=True))
    embedded = corrector.embed(z[held], z_preds[held], planneds[held], ks[held])
    seen = embedded.unfold(0, window, 1)[answers].flatten(0, 1).mT  # [S B, W, E]
    valid = inside.unfold(0, window, 1)[answers].flatten(0, 1)
    planneds, teacher, inside = planneds[answers], teacher[answers], inside[answers]
    action = corrector(History(seen, valid), planneds.flatten(0, 1)).unflatten(0, (steps, -1))
    return Unrolled(action, planneds, teacher, inside)


def squared_distance(action: Tensor, teacher: Tensor) -> Tensor:
    """Squared Euclidean distance `[...]` of actions `[..., A]` to the teacher's (the paper's loss)."""
    return (action - teacher).square().sum(-1)


def l1_distance(action: Tensor, teacher: Tensor) -> Tensor:
    """L1 distance `[...]` of actions `[..., A]` to the teacher's.

    If the teacher alternates between both ends of an action's range, the squared distance is least for an
    action in between, which the teacher never takes. The L1 distance is least for the more frequent end.
    """
    return (action - teacher).abs().sum(-1)


LOSSES: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {"mse": squared_distance, "l1": l1_distance}


def correction_loss(unrolled: Unrolled, residual_coef: float, loss: str) -> Tensor:
    """Mean over the steps of `distance(a_corr, a_teach) + residual_coef ||delta_a||^2`, a scalar.

    Both terms are sums over action dimensions; `loss` is a key of `LOSSES`. Adam's steps do not depend on the
    scale of a loss, so both losses use the same learning rate.
    """
    u = unrolled
    error = LOSSES[loss](u.action, u.teacher)
    residual = (u.action - u.planned).square().sum(-1)
    return ((error + residual_coef * residual) * u.inside).sum() / u.inside.sum()


def distance(action: Tensor, unrolled: Unrolled) -> Tensor:
    """Mean L1 distance `[S]` of `action` `[S, B, A]` to the teacher's, by step in plan."""
    error = l1_distance(action, unrolled.teacher) * unrolled.inside
    return error.sum(1) / unrolled.inside.sum(1)
