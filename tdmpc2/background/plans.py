"""A plan for later: predict where the agent will be, and plan from there."""

from typing import NamedTuple

import torch
from torch import Tensor

from ..agent import SpeculativeAgent
from ..step import PlanState


class Request(NamedTuple):
    """What is needed to plan for later, for `R` rows of an agent."""

    number: int  # of the request
    rows: Tensor  # [R] long, indices
    lead: int  # steps until the plan begins; 0: it begins at `now.z`
    action: Tensor  # [R, A], executed now
    now: PlanState  # `z` is the real latent; all else as before the next step
    executed: Tensor  # [R] long, steps from the start of the row's last plan to the start of this one


class Answer(NamedTuple):
    """Plans for the rows of a request."""

    number: int  # of the request
    rows: Tensor  # [R] long, indices
    plan: Tensor  # [R, H, A], mean plans
    latents: Tensor  # [R, H, L], predicted before each of their actions


@torch.no_grad()
def plan_ahead(agent: SpeculativeAgent, request: Request) -> Answer:
    """Plan from the latents predicted for `request.lead` steps later.

    Until then the agent will execute steps of its plan, correct and refine them. So this does the same with
    the predicted latents.

    Args:
        agent: plans; its own state is used only for warm starts.
        request: see `Request`.
    """
    model, now = agent.teacher.model, request.now
    z = now.z
    nobody = torch.zeros_like(now.k, dtype=torch.bool)
    action = request.action
    for j in range(request.lead):
        if j:
            step = agent.step(now._replace(z=z), nobody)
            now = now._replace(z_pred=step.z_pred, k=now.k + 1, history=step.history)
            action = step.action
        z = model.next(z, action, now.task)
    mean = agent.teacher.plan(z, request.rows, request.executed).mean
    latents = [z]
    for planned in mean[:, :-1].unbind(1):
        latents.append(model.next(latents[-1], planned, now.task))
    return Answer(request.number, request.rows, mean, torch.stack(latents, 1))
