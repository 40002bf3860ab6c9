"""How time is taken, and the speed that it is held against: the machine's own for matrix products.

Everything that is compared is measured in turns, round after round, so that whatever else the machine is
doing falls on all alike. The tenth percentile counts: what a case takes when nothing disturbs it.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

QUANTILE = 0.1
CEILING_SIZES = (512, 1024, 2048)


@dataclass(frozen=True, kw_only=True)
class Record:
    """One measurement."""

    name: str
    size: int  # of the model, in millions of parameters
    batch: int
    device: str
    dtype: str
    seconds: float
    flops: int | None = None  # that it requires; see flops.py
    ceiling_flops_per_s: float | None = None  # of matrix products in this dtype, in the same run
    ratio_to_ceiling: float | None = None  # seconds over those that `flops` take at the ceiling
    speedup_over_reference: float | None = None
    p99_seconds: float | None = None  # where `seconds` is a median
    resident_growth_bytes: int | None = None  # of the process, between the first tenth of `steps` and the end
    steps: int | None = None


def measure(cases: dict[str, Callable[[], object]], seconds: float) -> dict[str, float]:
    """Seconds that each case takes, from at least three rounds and `seconds` of them."""
    for case in cases.values():  # compile, allocate, fill caches
        case()
    times: dict[str, list[float]] = {name: [] for name in cases}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or min(map(len, times.values())) < 3:
        for name, case in cases.items():
            _synchronize()
            begin = time.perf_counter()
            case()
            _synchronize()
            times[name].append(time.perf_counter() - begin)
    return {name: float(np.quantile(t, QUANTILE)) for name, t in times.items()}


def ceiling_cases(device: str, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """Plain products of square matrices; the fastest of them is the ceiling."""

    def case(size: int) -> Callable[[], object]:
        a, b = torch.rand(2, size, size, device=device).to(dtype)
        return lambda: torch.mm(a, b)

    return {f"ceiling {size}": case(size) for size in CEILING_SIZES}


def ceiling(measured: dict[str, float]) -> float:
    """Operations a second, from what `measure` says of `ceiling_cases`."""
    return max(2 * size**3 / measured[f"ceiling {size}"] for size in CEILING_SIZES)


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
