"""A plan for later: predict where the agent will be, and plan from there."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..agent import SpeculativeAgent
from ..inference import AheadOfTime
from ..step import PlanState, Step


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


class LaterPlanner:
    """Plans from the latents predicted for some steps later.

    Until then the agent will execute steps of its plan, correct and refine them. So this does the same with
    the predicted latents.

    Args:
        agent: plans, for a copy of itself that acts. Its own state is used only for warm starts.
    """

    def __init__(self, agent: SpeculativeAgent):
        self.agent = agent
        self._run: Callable[..., Step] = agent.step
        if agent.is_compiled:
            self._run = AheadOfTime(agent.step, Step._make, what="the step of a plan")

    @torch.no_grad()
    def __call__(self, request: Request) -> Answer:
        """The plans that are asked for."""
        model, now, action, z = self.agent.teacher.model, request.now, request.action, request.now.z
        nobody = torch.zeros_like(now.k, dtype=torch.bool)
        for j in range(request.lead):
            if j:
                step = self._run(now._replace(z=z), nobody)
                now = now._replace(z_pred=step.z_pred, k=now.k + 1, history=step.history)
                action = step.action
            z = model.next(z, action, now.task)
        plan = self.agent.teacher.plan(z, request.rows, request.executed)
        return Answer(request.number, request.rows, plan.mean)

    def warm_up(self) -> None:
        """Plan two steps ahead, for one row and for all, to compile what is not compiled yet."""
        for number in {1, self.agent.num_envs}:  # each has a library of its own
            rows = torch.arange(number)
            now = self.agent.start().rows(rows)
            self(Request(0, rows, 2, torch.zeros_like(now.plan[:, 0]), now, torch.ones_like(rows)))
        self.agent.reset()
