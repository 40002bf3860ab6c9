"""The modes of execution that are compared: each is data, a `SpeculationConfig` with a name."""

from collections.abc import Mapping, Sequence

from ..config import SpeculationConfig

BASELINE = "baseline"
EXECUTION_HORIZONS = (3, 6)


def corrected(corrector: str, execution_horizon: int) -> str:
    """The name of a corrected mode."""
    return f"{corrector}_{execution_horizon}"


def standard_modes(
    correctors: Sequence[str], thresholds: Mapping[str, float | None]
) -> dict[str, SpeculationConfig]:
    """The baseline first, then naive and corrected execution of 3 and 6 steps, then the prior alone.

    Args:
        correctors: names of the correctors.
        thresholds: of the mismatch, for every corrected mode.
    """
    modes = {BASELINE: SpeculationConfig(execution_horizon=1)}
    for horizon in EXECUTION_HORIZONS:
        modes[f"naive_{horizon}"] = SpeculationConfig(execution_horizon=horizon)
    for corrector in correctors:
        for horizon in EXECUTION_HORIZONS:
            name = corrected(corrector, horizon)
            modes[name] = SpeculationConfig(
                execution_horizon=horizon, corrector=corrector, threshold=thresholds[name]
            )
    modes["prior"] = SpeculationConfig(execution_horizon=1, plan_length=0)
    return modes
