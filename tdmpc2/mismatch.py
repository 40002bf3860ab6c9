"""How far reality has drifted from the plan, and how far it may before the plan is thrown away."""

import pandas as pd
from torch import Tensor

from .errors import DataError


def mismatch(z: Tensor, z_pred: Tensor) -> Tensor:
    """Euclidean distance `[B]` of real and predicted latents `[B, L]`.

    Latents are products of simplices of eight entries, so no distance exceeds sqrt(2 L / 8).
    """
    return (z - z_pred).norm(dim=-1)


def calibrate_thresholds(steps: pd.DataFrame, quantile: float, horizon: int) -> tuple[float, ...]:
    """Thresholds for the steps in plan 1, 2, ... that a share `quantile` of the plans stays below throughout.

    Mismatch grows with the step in plan, so each step has a threshold of its own: the quantile of the
    mismatches there, times one factor for all steps. The factor is the quantile, over plans, of the largest
    ratio of mismatch to threshold. So `1 - quantile` is the rate of false alarms of a whole plan.

    Args:
        steps: columns `seed, t, k, mismatch`, in order, of plans executed without fallback.
        quantile: in (0, 1].
        horizon: execution horizon `K`; the first `K` steps of each plan count.

    Returns:
        At most `K - 1` thresholds; fewer where no plan lasted so long.

    Raises:
        DataError: at some step there is no finite mismatch to calibrate on.
    """
    later = steps[(steps["k"] > 0) & (steps["k"] < horizon)]
    at_k = later.groupby("k")["mismatch"].quantile(quantile)
    if not len(at_k) or at_k.isna().any():
        raise DataError("no mismatch to calibrate on: the calibration episodes hold no step beyond k = 0")
    at_k = at_k.clip(lower=1e-9)  # in a world that is predicted exactly
    plan = (steps["k"] == 0).cumsum()
    largest = (later["mismatch"] / later["k"].map(at_k)).groupby(plan).max()
    return tuple((at_k * largest.quantile(quantile)).tolist())
