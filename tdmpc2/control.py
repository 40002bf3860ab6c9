"""One control step as one compiled module, from the observation to the action.

It encodes the observation, takes the plans that have arrived, asks the monitor, and executes one step of each
plan.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from .corrector import History
from .monitor import Monitor
from .step import PlanState, PlanStep


class Ahead(NamedTuple):
    """Where plans are in time. A row without a plan is at a plan's end, and its age is 0."""

    k: Tensor  # [B] long, step of the plan to execute now; above 0 for a plan that is late
    age: Tensor  # [B] long, steps since it was asked for; 0: made for the real latent of now


class Arrival(NamedTuple):
    """New plans, some of which are here."""

    here: Tensor  # [B] bool
    plan: Tensor  # [B, H, A]
    ahead: Ahead | None = None  # None: all are made for the real latents of now


class Control(NamedTuple):
    """The result of one control step."""

    planned: Tensor  # [B, A]
    action: Tensor  # [B, A], corrected and refined
    z: Tensor  # [B, L], real latents
    z_pred: Tensor  # [B, L], predicted for the next step
    plan: Tensor  # [B, H, A], the plans that are executed
    k: Tensor  # [B] long, the step in plan that was executed
    taken: Tensor  # [B] bool, the row begins with what has arrived
    measured: Tensor  # [B], the mismatch
    given_up: Tensor  # [B] bool, a new plan is needed
    alarm: Tensor  # [] bool, a row is given up, or a latent is not finite
    steps: Tensor | None = None  # of the history with this step; None without a corrector
    valid: Tensor | None = None  # of the history with this step

    def then(self, now: PlanState) -> PlanState:
        """The state before the next observation; `now`: the state before this one."""
        history = None if self.steps is None or self.valid is None else History(self.steps, self.valid)
        return PlanState(self.z, self.z_pred, self.plan, self.k + 1, history, now.task)


class ControlStep(nn.Module):
    """From observations to actions.

    Args:
        step: executes a step of each plan; its model encodes the observations.
        monitor: says when a plan is given up.
    """

    def __init__(self, step: PlanStep, monitor: Monitor):
        super().__init__()
        self.step, self.monitor = step, monitor

    def forward(self, obs: Tensor, now: PlanState, arrival: Arrival) -> Control:
        """One control step of each row.

        When a plan is taken, its prediction begins at the real latent, also if the plan was made for another.
        A plan that is given up is executed, corrected, until a new one is here.

        Args:
            obs: `[B, *obs_shape]`, as `read_observation` returns them.
            now: the state before these observations; its `z` is not used.
            arrival: new plans.
        """
        now = now._replace(z=self.step.model.encode(obs, now.task))
        taken, k, exact = arrival.here, torch.zeros_like(now.k), arrival.here
        if (ahead := arrival.ahead) is not None:
            k, exact = ahead.k, taken & (ahead.age == 0)
        measured, given_up = self.monitor(now, self.step)
        now = now._replace(
            plan=torch.where(taken[:, None, None], arrival.plan, now.plan),
            z_pred=torch.where(taken[:, None], now.z, now.z_pred),
            k=torch.where(taken, k, now.k),
        )
        given_up = given_up & ~taken
        step = self.step(now, exact)
        return Control(
            step.planned,
            step.action,
            now.z,
            step.z_pred,
            now.plan,
            now.k,
            taken,
            measured,
            given_up,
            given_up.any() | ~now.z.isfinite().all(),
            step.steps,
            step.valid,
        )
