"""Which episodes are evaluated, and what a mode must keep to be chosen."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ..checked import Checked, at_least
from ..corrector import read_header
from ..errors import ConfigError
from .modes import HORIZONS


@dataclass(frozen=True)
class EpisodesConfig(Checked):
    """Which episodes are evaluated."""

    episodes: int = 20  # per mode
    seed: int = 20_000  # the first of them; the others follow
    num_envs: int = 10  # episodes run as one batch

    def check_ranges(self) -> None:
        at_least(1, self, "episodes", "num_envs")
        at_least(0, self, "seed")

    @property
    def seeds(self) -> range:
        return range(self.seed, self.seed + self.episodes)


@dataclass(frozen=True)
class EvaluationConfig(EpisodesConfig):
    """How much is evaluated, on which seeds, and what a mode must keep to be chosen."""

    calibration_episodes: int = 30  # per mode
    calibration_seed: int = 10_000
    horizons: tuple[int, ...] = HORIZONS  # execution horizons with a corrector
    quantile: float = 0.9  # share of calibration plans whose mismatch stays below the thresholds
    label_episodes: int = 1  # per mode, of those that run at once: distance to the teacher is measured there
    latency_steps: int = 500  # per mode, from the first step of an episode on
    min_return: float = 0.98  # ratio to the baseline that a chosen mode must keep
    min_return_pushed: float = 0.95  # the same where both are pushed, on average; 0: no mode is pushed

    def check_ranges(self) -> None:
        super().check_ranges()
        at_least(2, self, "calibration_episodes")  # a single one has no interval: no mode could be chosen
        at_least(1, self, "latency_steps")
        at_least(0, self, "calibration_seed")
        if not self.horizons or min(self.horizons) < 2 or len(set(self.horizons)) < len(self.horizons):
            raise ConfigError(f"horizons={list(self.horizons)}: give different numbers, at least 2")
        for name in ("quantile", "min_return", "min_return_pushed"):
            value = getattr(self, name)
            if not (0 < value <= 1 or (value == 0 and name == "min_return_pushed")):
                raise ConfigError(f"{name}={value}: must be above 0 and at most 1")
        if not 0 <= self.label_episodes <= min(self.num_envs, self.episodes):
            raise ConfigError(
                f"label_episodes={self.label_episodes}: these are among the episodes that run at once, at "
                f"most {min(self.num_envs, self.episodes)}"
            )
        if overlap(self.seeds, self.calibration_seeds):
            raise ConfigError(f"seed={self.seed}: evaluation seeds overlap the calibration seeds")

    @property
    def calibration_seeds(self) -> range:
        return range(self.calibration_seed, self.calibration_seed + self.calibration_episodes)


def overlap(a: range, b: range) -> bool:
    return max(a.start, b.start) < min(a.stop, b.stop)


def check_unseen(seeds: Iterable[int], correctors: Iterable[Path]) -> None:
    """Raise ConfigError where a corrector in one of these folders was trained on episodes of these seeds."""
    for folder in correctors:
        seen = set(read_header(folder).get("seeds", ()))  # correctors of earlier versions do not tell
        if seen.intersection(seeds):
            raise ConfigError(
                f"{folder} was trained on episodes with seeds of this evaluation: change evaluation.seed or "
                "evaluation.calibration_seed"
            )
