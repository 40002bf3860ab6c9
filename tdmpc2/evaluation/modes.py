"""The compared modes: each is data, a `SpeculationConfig` with a name.

baseline                   TD-MPC2 itself: it replans at every step
half_budget                the same with half of the planner's iterations
naive_K, plan_K            K steps of each plan, uncorrected, without and with the monitor
two_tower_K, temporal_K    K steps of each plan, corrected: the published system
..._K_refined              K steps of each plan, corrected and refined
distilled                  the distilled policy alone, without plans; also refined
prior                      the policy prior alone, without plans
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from ..config import TEACHER, SpeculationConfig
from ..corrector import ARCHITECTURES

BASELINE = "baseline"
DISTILLED = "distilled"  # a policy in the form of a corrector; it ignores the plan
REFINED = "_refined"  # suffix of the modes that refine
SIMPLER = ("half_budget", "naive_3", "naive_6", DISTILLED, DISTILLED + REFINED, "prior")
OPEN_LOOP_HORIZONS = (3, 6)  # execution horizons without a corrector
PAPER_HORIZONS = (3, 6)  # execution horizons of the published system
HORIZONS = (3, 6, 12, 24)  # execution horizons with a corrector
ALONE = SpeculationConfig(execution_horizon=1, corrector=DISTILLED, plan_length=0)
PRIOR = SpeculationConfig(execution_horizon=1, plan_length=0)


class Family(NamedTuple):
    """Modes that differ only in the execution horizon."""

    corrector: str  # "": none
    refined: bool = False
    horizons: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        return (self.corrector or "plan") + (REFINED if self.refined else "")

    def mode_name(self, horizon: int) -> str:
        return f"{self.corrector or 'plan'}_{horizon}{REFINED if self.refined else ''}"


def families(correctors: Sequence[str], horizons: tuple[int, ...]) -> list[Family]:
    """The families of modes with these correctors; the first has no corrector.

    Args:
        correctors: their names.
        horizons: execution horizons of corrected modes.
    """
    corrected = [
        Family(name, refined, () if name == DISTILLED else horizons)
        for name in correctors
        for refined in (False, True)
    ]
    return [Family("", horizons=OPEN_LOOP_HORIZONS), *corrected]


def simple_modes(iterations: int) -> dict[str, SpeculationConfig]:
    """The baseline, then cheaper plans and naive execution.

    Args:
        iterations: of the teacher's planner.
    """
    half = replace(TEACHER, iterations=max(iterations // 2, 1))
    naive = {f"naive_{k}": SpeculationConfig(execution_horizon=k) for k in OPEN_LOOP_HORIZONS}
    return {BASELINE: TEACHER, "half_budget": half, **naive}


def is_mode(name: str) -> bool:
    """Whether a mode can have this name."""
    return re.fullmatch(rf"(plan|naive|{'|'.join(ARCHITECTURES)})_\d+({REFINED})?", name) is not None or (
        name in (BASELINE, *SIMPLER)
    )
