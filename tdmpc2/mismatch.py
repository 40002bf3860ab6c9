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


def calibrate_threshold(mismatches: np.ndarray, quantile: float) -> float:
    """The threshold that a share `quantile` of calibration steps stays below.

    Args:
        mismatches: of plans that were executed without fallback.
        quantile: in (0, 1].

    Raises:
        DataError: there is no finite mismatch to calibrate on.
    """
    finite = mismatches[np.isfinite(mismatches)]
    if finite.size == 0:
        raise DataError("no mismatch to calibrate on: the calibration episodes hold no step beyond k = 0")
    return float(np.quantile(finite, quantile))


def calibrate_thresholds(steps: pd.DataFrame, quantile: float) -> tuple[float, ...]:
    """A threshold for every step in plan k = 1, 2, ...: a plan drifts from reality the further the longer.

    One threshold for all steps would be blind where a plan has just begun.

    Args:
        steps: columns `k, mismatch`, of plans that were executed without fallback.
        quantile: share of the steps at each k that stay below, in (0, 1].

    Raises:
        DataError: at some step there is no finite mismatch to calibrate on.
    """
    last = max(int(steps["k"].max()), 1)
    at = [steps.loc[steps["k"] == k, "mismatch"].to_numpy() for k in range(1, last + 1)]
    return tuple(calibrate_threshold(mismatches, quantile) for mismatches in at)


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
    return usual - calibrate_threshold(worst, quantile), usual
