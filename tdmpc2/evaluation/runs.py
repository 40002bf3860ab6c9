"""Episodes of modes, kept in files: an evaluation that was killed runs only what is missing.

FOLDER/episodes.csv, steps.csv     the raw results of one mode
FOLDER/settings.json               the mode; it is written last
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ..agent import SpeculativeAgent
from ..config import SpeculationConfig
from ..corrector import BaseCorrector
from ..errors import ConfigError
from ..files import atomic_write, difference, read_json, write_json
from ..teacher import Teacher
from ..workers import Workers
from .rollout import Rollout, measure_latency, random_returns, rollout

LABELLER = 1_000_003  # added to the planner's seed, so that labels have noise of their own


@dataclass(frozen=True)
class Subject:
    """What is evaluated: a teacher and its correctors."""

    teacher: Teacher
    correctors: Mapping[str, BaseCorrector]

    def agent(self, mode: SpeculationConfig, num_envs: int, seed: int) -> SpeculativeAgent:
        corrector = self.correctors[mode.corrector] if mode.corrector else None
        return SpeculativeAgent(self.teacher.agent(num_envs, seed), mode, corrector)

    def rollout(
        self,
        mode: SpeculationConfig,
        seeds: Sequence[int],
        num_envs: int,
        *,
        label_episodes: int = 0,
        on_step: Callable[[int], None] = lambda done: None,
    ) -> Rollout:
        """Episodes of `mode` on `seeds`; the planner's noise begins from the first of them."""
        n = min(num_envs, len(seeds))
        labelled = min(label_episodes, n)
        labeller = self.teacher.agent(labelled, seeds[0] + LABELLER) if labelled else None
        agent = self.agent(mode, n, seeds[0])
        return rollout(agent, self.teacher.env, seeds, labeller=labeller, on_step=on_step)


@dataclass(frozen=True)
class Run:
    """Episodes of one mode, and the folder of their results, whose name is the mode's."""

    subject: Subject
    mode: SpeculationConfig
    seeds: Sequence[int]
    num_envs: int  # episodes run as one batch
    folder: Path
    label_episodes: int = 0  # of the first batch, that measure the distance to the teacher's action

    def is_kept(self) -> bool:
        """Whether the folder holds the results; ConfigError where it holds those of another mode."""
        return _same_settings(self.folder / "settings.json", asdict(self.mode))

    def kept(self) -> Rollout:
        return Rollout(*(pd.read_csv(self.folder / f"{name}.csv") for name in Rollout._fields))


def execute(runs: Mapping[str, Run], name: str, workers: Workers) -> None:
    """Run the episodes that are not kept yet.

    Args:
        runs: by the name that is shown when one ends.
        name: of the stage that is shown.
        workers: run them.
    """
    missing = {label: (run,) for label, run in runs.items() if not run.is_kept()}
    if missing:
        task = next(iter(runs.values())).subject.teacher.task
        for label, mean in workers.map(name, _execute, missing, task=task):
            workers.progress.print(f"{label}: mean return {mean:.1f}")


def _execute(run: Run, advance: Callable[[float], None]) -> float:
    """Run the episodes and keep them; returns their mean return."""
    result = run.subject.rollout(
        run.mode,
        run.seeds,
        run.num_envs,
        label_episodes=run.label_episodes,
        on_step=lambda ended: advance(1),
    )
    for name, table in result._asdict().items():
        write_csv(run.folder / f"{name}.csv", table)
    write_json(run.folder / "settings.json", asdict(run.mode))
    return float(result.episodes["return"].mean())


def runs_of(
    subject: Subject,
    modes: Mapping[str, SpeculationConfig],
    seeds: Sequence[int],
    num_envs: int,
    out: Path,
    label_episodes: int = 0,
) -> dict[str, Run]:
    """A run for every mode, in a folder of its own in `out`."""
    return {
        name: Run(subject, mode, seeds, num_envs, out / name, label_episodes) for name, mode in modes.items()
    }


def kept(runs: Mapping[str, Run]) -> Rollout:
    """The results of all modes in one table each, column `mode` in front."""
    results = {mode: run.kept() for mode, run in runs.items()}
    return Rollout(
        _joined({mode: r.episodes for mode, r in results.items()}),
        _joined({mode: r.steps for mode, r in results.items()}),
    )


def latency_of(
    subject: Subject,
    modes: Mapping[str, SpeculationConfig],
    seed: int,
    steps: int,
    path: Path,
    workers: Workers,
) -> pd.DataFrame:
    """Times of single steps, in this process, which nothing else shares; kept in `path`."""
    if not path.exists():
        workers.progress.print("measuring the time of single steps, all modes in turn")
        agents = {name: subject.agent(mode, 1, seed) for name, mode in modes.items()}
        write_csv(path, measure_latency(agents, subject.teacher.env, seed, steps))
    return pd.read_csv(path)


def returns_of_random_actions(teacher: Teacher, seeds: Sequence[int], path: Path) -> np.ndarray:
    """Returns `[n]` of random actions on these seeds, kept in `path`."""
    if not path.exists():
        returns = random_returns(teacher.env, seeds)
        write_csv(path, pd.DataFrame({"seed": seeds, "return": returns}))
    return pd.read_csv(path)["return"].to_numpy()


def claim(out: Path, settings: dict[str, Any], free: Collection[str] = ()) -> None:
    """Make `out` the folder of results with these settings; ConfigError where others than `free` differ."""
    if not _same_settings(out / "settings.json", settings, free):
        write_json(out / "settings.json", settings)


def _same_settings(path: Path, settings: dict[str, Any], free: Collection[str] = ()) -> bool:
    """Whether `path` holds these settings; False where there is no such file."""
    if not path.exists():
        return False
    if differs := difference(read_json(path), settings, free):
        raise ConfigError(f"{path} was written with {differs}: choose another out=, or delete it")
    return True


def _joined(tables: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Tables of the modes under one another, the mode's name in front."""
    named = [table.assign(mode=name) for name, table in tables.items()]
    table = pd.concat(named, ignore_index=True)
    return table[["mode", *(c for c in table.columns if c != "mode")]]


def write_csv(path: Path, table: pd.DataFrame) -> None:
    with atomic_write(path) as tmp:
        table.to_csv(tmp, index=False)
