"""Calibration seeds, for the programs that calibrate thresholds themselves."""

from dataclasses import dataclass

from tdmpc2.checked import Checked, at_least
from tdmpc2.errors import ConfigError
from tdmpc2.evaluation.config import EpisodesConfig, overlap


@dataclass(frozen=True, kw_only=True)
class Calibrated(Checked):
    """Calibration episodes, with seeds of their own."""

    calibration_seed: int = 10_000
    calibration_episodes: int = 20
    evaluation: EpisodesConfig

    def check_ranges(self) -> None:
        at_least(1, self, "calibration_episodes")
        at_least(0, self, "calibration_seed")
        if overlap(self.calibration_seeds, self.evaluation.seeds):
            raise ConfigError(
                f"evaluation.seed={self.evaluation.seed}: evaluation seeds overlap the calibration seeds"
            )

    @property
    def calibration_seeds(self) -> range:
        return range(self.calibration_seed, self.calibration_seed + self.calibration_episodes)
