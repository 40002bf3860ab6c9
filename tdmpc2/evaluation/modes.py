"""The modes of execution that are compared: each is data, a `SpeculationConfig` with a name."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from ..config import TEACHER, SpeculationConfig

BASELINE = "baseline"
DISTILLED = "distilled"  # a corrector that corrects nothing: it acts alone
SIMPLER = ("half_budget", "naive_3", "naive_6", DISTILLED, "prior")  # what a sceptic would do instead
PLAN = "plan"  # what modes without a corrector are named by
OPEN_LOOP_HORIZONS = (3, 6)
HORIZONS = (3, 6, 12, 24)  # execution horizons of corrected modes
ALONE = SpeculationConfig(execution_horizon=1, corrector=DISTILLED, plan_length=0)
PRIOR = SpeculationConfig(execution_horizon=1, plan_length=0)
FOREVER = 1_000_000  # steps: an execution horizon that no episode reaches
GROWTH = 2  # of plans that have no other limit


class Limits(NamedTuple):
    """Where a mode gives its plan up."""

    threshold: tuple[float, ...]  # of the mismatch, for steps 1, 2, ... of a plan
    min_td_error: float | None = None  # without a corrector nothing watches TD errors
    usual_td_error: float = 0.0


def watched(corrector: str) -> dict[str, int]:
    """The modes with fallback of a corrector, or of none (""), and their execution horizons.

    `until` replans where a limit says so, and where a plan has lasted `GROWTH` times as long as the last one.
    """
    if corrector == DISTILLED:
        return {}
    if not corrector:
        return {f"{PLAN}_{k}": k for k in OPEN_LOOP_HORIZONS}
    return {**{f"{corrector}_{k}": k for k in HORIZONS}, f"{corrector}_until": FOREVER}


def standard_modes(
    correctors: Sequence[str],
    limits: Mapping[str, Limits],
    refine_steps: Mapping[str, int],
    iterations: int,
) -> dict[str, SpeculationConfig]:
    """Every mode: the baseline first, then what is simpler than speculation, then speculation.

    Args:
        correctors: names of the correctors.
        limits: of every mode with fallback.
        refine_steps: of every corrector, and of none ("").
        iterations: of the teacher's planner.
    """
    modes = {
        BASELINE: TEACHER,
        "half_budget": replace(TEACHER, iterations=max(iterations // 2, 1)),
    }
    for horizon in OPEN_LOOP_HORIZONS:
        modes[f"naive_{horizon}"] = SpeculationConfig(execution_horizon=horizon)
    for corrector in ["", *correctors]:
        for name, horizon in watched(corrector).items():
            modes[name] = SpeculationConfig(
                execution_horizon=horizon,
                growth=GROWTH if horizon == FOREVER else None,
                corrector=corrector,
                refine_steps=refine_steps[corrector],
                **limits[name]._asdict(),
            )
    if DISTILLED in correctors:
        modes[DISTILLED] = replace(ALONE, refine_steps=refine_steps[DISTILLED])
    modes["prior"] = PRIOR
    return modes
