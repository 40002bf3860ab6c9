"""The monitor: the mismatch of a plan, and when the plan is given up."""

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .errors import DataError
from .step import PlanState, PlanStep

if TYPE_CHECKING:
    import pandas as pd


class Monitor(nn.Module):
    """Says when a plan is given up: when the mismatch is above the threshold for its step in plan.

    For another rule, override `measure` or `forward`, and pass the monitor to the agent as `monitor`:

        class ActionGap(Monitor):
            def measure(self, now, step):
                predicted = step.model.prior(now.z_pred, now.task)
                return (step.model.prior(now.z, now.task) - predicted).norm(dim=-1)

    Args:
        threshold: for steps in plan 1, 2, ...; the last holds for all later steps. None: never give up.
    """

    thresholds: Tensor

    def __init__(self, threshold: tuple[float, ...] | None = None):
        super().__init__()
        numbers = torch.tensor(threshold or (math.inf,), dtype=torch.float32, device="cpu")
        # At least 64, so that a compiled library serves every number of thresholds.
        numbers = torch.cat([numbers, numbers[-1:].expand(max(64 - len(numbers), 0))])
        self.register_buffer("thresholds", numbers, persistent=False)

    def forward(self, now: PlanState, step: PlanStep) -> tuple[Tensor, Tensor]:
        """The measure `[B]`, and whether the plan is given up `[B]` bool; NaN counts as too large."""
        measured = self.measure(now, step)
        return measured, ~(measured <= self.thresholds[(now.k - 1).clamp(0, len(self.thresholds) - 1)])

    def measure(self, now: PlanState, step: PlanStep) -> Tensor:
        """The mismatch `[B]`, compared with the threshold: the distance of real and predicted latents.

        Latents are products of simplices of eight entries, so it is at most sqrt(2 L / 8).

        Args:
            now: the state of the plans.
            step: executes them; a rule can ask it for the action to be executed now.
        """
        return (now.z - now.z_pred).norm(dim=-1)


def calibrate_thresholds(steps: "pd.DataFrame", quantile: float, horizon: int) -> tuple[float, ...]:
    """Thresholds for steps in plan 1, 2, ...; a share `quantile` of the plans stays below all of them.

    Mismatch grows with the step in plan, so each step has its own threshold: the quantile of the
    mismatches at this step, times one factor for all steps. The factor is the quantile, over plans, of the
    largest ratio of mismatch to quantile. `1 - quantile` is then the rate of false alarms per plan.

    Args:
        steps: columns `seed, t, k, mismatch`, in order, of plans executed without fallback.
        quantile: in (0, 1].
        horizon: execution horizon `K`; the first `K` steps of each plan count.

    Returns:
        At most `K - 1` thresholds; fewer if no plan lasted so long.

    Raises:
        DataError: a step has no finite mismatch to calibrate on.
    """
    later = steps[(steps["k"] > 0) & (steps["k"] < horizon)]
    at_k = later.groupby("k")["mismatch"].quantile(quantile)
    if not len(at_k) or at_k.isna().any():
        raise DataError("no mismatch to calibrate on: the calibration episodes hold no step beyond k = 0")
    at_k = at_k.clip(lower=1e-9)  # 0 in a world that is predicted exactly
    plan = (steps["k"] == 0).cumsum()
    largest = (later["mismatch"] / later["k"].map(at_k)).groupby(plan).max()
    return tuple((at_k * largest.quantile(quantile)).tolist())
