"""How far reality has drifted from the plan, and how far it may before the plan is thrown away.

What a mismatch does not show, TD errors may: `r(z, a) + gamma V(z') - V(z)`, what a step really led to beside
what was promised before it, all by the world model. A single one is mostly noise, but where the agent is
losing, be it that the world is not as modelled, their mean falls.
"""

import numpy as np
import pandas as pd
from torch import Tensor

from .errors import DataError

TD_STEPS = 50  # the last TD errors that their running mean is of, more or less: its time constant


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


def calibrate_td_error(steps: pd.DataFrame, quantile: float) -> tuple[float, float]:
    """The limit that the mean of TD errors keeps above in a share `quantile` of episodes, and its start.

    Not of steps: a single episode that is lost would have enough of them to set the limit.

    Args:
        steps: columns `seed, td_error`, of plans that were executed without fallback.
        quantile: in (0, 1].

    Raises:
        DataError: there is no finite TD error to calibrate on.
    """
    usual = float(steps.groupby("seed")["td_error"].mean().median())
    if not np.isfinite(usual):
        raise DataError("no TD error to calibrate on: no calibration episode holds two steps")
    less = (usual - steps["td_error"]).fillna(0.0)  # none in an episode's first step, where the mean begins
    running = less.groupby(steps["seed"]).transform(lambda x: x.ewm(alpha=1 / TD_STEPS, adjust=False).mean())
    worst = running.groupby(steps["seed"]).max().to_numpy()
    return usual - float(np.quantile(worst, quantile)), usual
