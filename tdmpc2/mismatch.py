"""How far reality has drifted from the plan, and how far it may before the plan is thrown away."""

import numpy as np
from torch import Tensor

from .errors import DataError


def mismatch(z: Tensor, z_pred: Tensor) -> Tensor:
    """Euclidean distance `[B]` of real and predicted latents `[B, L]`.

    Latents are products of simplices of eight entries, so no distance exceeds sqrt(2 L / 8).
    """
    return (z - z_pred).norm(dim=-1)


def calibrate_threshold(mismatches: np.ndarray, quantile: float) -> float:
    """The threshold that a share `quantile` of calibration steps stays below.

    Args:
        mismatches: at steps k >= 1 of plans that were executed without fallback.
        quantile: in (0, 1].

    Raises:
        DataError: there is no finite mismatch to calibrate on.
    """
    finite = mismatches[np.isfinite(mismatches)]
    if finite.size == 0:
        raise DataError("no mismatch to calibrate on: the calibration episodes hold no step beyond k = 0")
    return float(np.quantile(finite, quantile))
