"""One step of a plan: planned action, correction, refining, prediction."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from .config import PlannerConfig, SpeculationConfig
from .corrector import BaseCorrector, History
from .refine import offsets, refine
from .world_model.model import WorldModel


class PlanState(NamedTuple):
    """The state of each row's plan when an observation arrives."""

    z: Tensor  # [B, L], real latents
    z_pred: Tensor  # [B, L], predicted latents
    plan: Tensor  # [B, H, A], planned actions
    k: Tensor  # [B] long, step in plan
    history: History | None  # earlier steps; None without a corrector
    task: Tensor | None  # [B] long, task indices; None for a single-task model

    def rows(self, index: Tensor) -> "PlanState":
        """The state of the rows `index` `[R]`."""
        return tree_map(lambda x: None if x is None else x[index], self)  # type: ignore[no-any-return]


class Step(NamedTuple):
    """The result of one step of a plan."""

    planned: Tensor  # [B, A]
    action: Tensor  # [B, A], corrected and refined
    z_pred: Tensor  # [B, L], predicted for the next step
    steps: Tensor | None = None  # of the history with this step; None without a corrector
    valid: Tensor | None = None  # of the history with this step

    @property
    def history(self) -> History | None:
        return None if self.steps is None or self.valid is None else History(self.steps, self.valid)


class PlanStep(nn.Module):
    """Executes one step of each row's plan.

    Args:
        model: predicts latents and values actions.
        corrector: None executes plans without correction.
        config: the mode of execution.
        plan_length: steps taken from a plan before the prior extends it.
        planner: refining uses its temperature.
        discount: per agent step.
    """

    around: Tensor

    def __init__(
        self,
        model: WorldModel,
        corrector: BaseCorrector | None,
        config: SpeculationConfig,
        plan_length: int,
        planner: PlannerConfig,
        discount: float,
    ):
        super().__init__()
        self.model, self.corrector = model, corrector
        self.plan_length, self.refine_steps = plan_length, config.refine_steps
        self.discount, self.temperature = discount, planner.temperature
        # At execution horizon 1 every step replans: nothing is predicted, and the corrector corrects step 0.
        # As a bool, so that one compilation serves all horizons.
        self.predicts = config.execution_horizon > 1
        device = next(model.parameters()).device
        self.register_buffer("around", offsets(model.config.action_dim).to(device), persistent=False)

    def forward(self, now: PlanState, replan: Tensor) -> Step:
        """Execute step `now.k` of the plans. Rows that just replanned (`replan` `[B]`) are not corrected."""
        planned = self.planned(now)
        action, history = self.corrected(now, planned)
        if history is not None and self.predicts:
            action = torch.where(replan[:, None], planned, action)
        z_pred = self.model.next(now.z_pred, action, now.task) if self.predicts else now.z_pred
        return Step(planned, action, z_pred, *(history or ()))

    def planned(self, now: PlanState) -> Tensor:
        """Planned actions `[B, A]`; past the plan's end, the prior's at the real latent.

        At the predicted latent, the prior would follow the model's errors.
        """
        if not self.plan_length:
            return self.model.prior(now.z, now.task)
        in_plan = now.k < self.plan_length
        index = now.k.clamp(max=now.plan.shape[1] - 1)[:, None, None]
        planned = now.plan.gather(1, index.expand(-1, 1, now.plan.shape[2])).squeeze(1)
        if not torch.compiler.is_compiling() and in_plan.all():
            return planned
        return torch.where(in_plan[:, None], planned, self.model.prior(now.z, now.task))

    def corrected(self, now: PlanState, planned: Tensor) -> tuple[Tensor, History | None]:
        """Corrected and refined actions `[B, A]`, and the history with this step (None: no corrector)."""
        if self.corrector is None or now.history is None:
            return planned, None
        history = now.history.then(self.corrector.embed(now.z, now.z_pred, planned, now.k))
        action = self.corrector(history, planned)
        if self.refine_steps:
            action = refine(
                self.model,
                now.z,
                action,
                planned,
                self.around,
                now.task,
                steps=self.refine_steps,
                discount=self.discount,
                temperature=self.temperature,
            )
        return action, history
