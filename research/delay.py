"""What is left of the return when plans come late: the world goes on while the agent plans.

    python research/delay.py task=walker-walk agent=accelerated/walker-walk

A plan that is asked for at step t comes at step t + d, in every mode. So nothing here depends on the speed
of a machine. All modes run the same episodes. Writes `results/delay/TASK.csv`, a row an episode, and
`TASK.json`, where the numbers come from. A run that was stopped goes on.

teacher, holds    TD-MPC2 plans one plan after another, and holds its last action until the next plan is there
teacher, goes on  the same; until then it executes the actions of the last plan that were meant for now
naive_K           K steps of each plan, made for the latent predicted for its first step
two_tower_K...    the same, corrected (and refined): what `background=True` does
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import pandas as pd
import torch
from modes import corrector_of, evaluated
from rich.console import Console
from torch import Tensor

from tdmpc2 import cli
from tdmpc2.agent import TDMPC2, Array, Kind, SpeculativeAgent, StepInfo
from tdmpc2.background import in_background
from tdmpc2.checked import Checked, at_least
from tdmpc2.config import TEACHER, BudgetOverride, SpeculationConfig
from tdmpc2.errors import ConfigError
from tdmpc2.evaluation.config import EpisodesConfig, check_unseen
from tdmpc2.evaluation.modes import BASELINE
from tdmpc2.evaluation.rollout import rollout
from tdmpc2.evaluation.runs import claim, write_csv
from tdmpc2.files import write_json
from tdmpc2.inputs import like
from tdmpc2.progress import Progress
from tdmpc2.provenance import provenance
from tdmpc2.teacher import Teacher, open_teacher
from tdmpc2.workers import Workers

MAY_CHANGE = ("delays", "modes", "workers")  # in a run that goes on
HOLDS, GOES_ON = "teacher, holds", "teacher, goes on"


@dataclass(frozen=True, kw_only=True)
class DelayConfig(Checked):
    """What is compared."""

    task: str
    agent: str  # the folder of an acceleration, with the modes of its evaluation
    delays: tuple[int, ...] = (0, 1, 2, 4, 8)  # steps that a plan takes
    modes: tuple[str, ...] = (
        *("two_tower_24", "two_tower_24_refined", "naive_3", "naive_6"),
        *("two_tower_3", "two_tower_6", "two_tower_12"),
    )
    workers: int = 0  # processes; 0: one for each core
    out: str = "results/delay"
    planner: BudgetOverride = field(default_factory=BudgetOverride)
    evaluation: EpisodesConfig = field(default_factory=lambda: EpisodesConfig(seed=80_000, num_envs=20))

    def check_ranges(self) -> None:
        at_least(0, self, "workers")
        if not self.delays or min(self.delays) < 0:
            raise ConfigError(f"delays={list(self.delays)}: give numbers of at least 0")


class LateTeacher:
    """TD-MPC2 that plans one plan after another, each from the real latent, and gets it `delay` steps later.

    All rows begin their episodes together.

    Args:
        teacher: plans.
        delay: at least 1.
        holds: hold the last action; otherwise go on with the last plan, and hold its last action past its
            end.
    """

    def __init__(self, teacher: TDMPC2, delay: int, *, holds: bool):
        self.teacher, self.delay, self.holds = teacher, delay, holds
        self.num_envs = teacher.num_envs
        self.info: StepInfo | None = None
        self.reset()

    def reset(self, mask: object = None) -> None:
        self.teacher.reset(mask)
        self._t, self._asked = 0, 0  # this step; the step in which the plan under way was asked for
        self._begun = 0  # the step for which the present plan was made
        self._plan = self._next = torch.zeros(0)

    def act(self, obs: Array) -> Array:
        asked = True
        if self._t == 0:  # the first plan may take its time
            self._plan = self._next = self._planned(obs, executed=0)
        elif self._t == 1:
            self._next, self._asked = self._planned(obs, executed=1), 1
        elif self._t - self._asked == self.delay:
            self._plan, self._begun = self._next, self._asked
            self._next, self._asked = self._planned(obs, executed=self.delay), self._t
        else:
            asked = False
        last = self._plan.shape[1] - 1
        action = self._plan[:, 0 if self.holds else min(self._t - self._begun, last)]
        self._t += 1
        zero = torch.zeros(self.num_envs)
        yes, kind = (zero + asked).bool(), Kind.PLANNED if asked else Kind.OPEN_LOOP
        self.info = StepInfo((zero + kind).long(), zero.long(), zero, zero, yes, yes, yes, zero.long())
        return like(action, obs, self.teacher.model.config)  # type: ignore[return-value]

    def _planned(self, obs: Array, executed: int) -> Tensor:
        steps = torch.full((self.num_envs,), executed)
        plan = self.teacher.plan(self.teacher.encode(obs), None, steps)
        return torch.cat([plan.actions[:, :1], plan.mean[:, 1:]], 1)


def arms(
    teacher: Teacher, config: DelayConfig
) -> dict[tuple[str, int], Callable[[int, int], SpeculativeAgent | LateTeacher]]:
    """What makes the agent of each mode and delay, from the number of its rows and a seed."""
    folder = Path(config.agent)

    def background(mode: SpeculationConfig, delay: int, rows: int, seed: int) -> SpeculativeAgent:
        corrector = corrector_of(folder, mode, teacher.fingerprint)
        return in_background(partial(teacher.agent, rows, seed), mode, corrector, delay=delay)

    def late(delay: int, holds: bool, rows: int, seed: int) -> LateTeacher:
        return LateTeacher(teacher.agent(rows, seed), delay, holds=holds)

    found: dict[tuple[str, int], Callable[[int, int], SpeculativeAgent | LateTeacher]] = {
        (BASELINE, 0): partial(background, TEACHER, 0)
    }
    for delay in config.delays:
        for name in config.modes:
            found[name, delay] = partial(background, evaluated(folder, name), delay)
    for delay in sorted(set(config.delays) - {0}, reverse=True):
        for name in (GOES_ON, HOLDS):
            found[name, delay] = partial(late, delay, name == HOLDS)
    return found


def run(config: DelayConfig, mode: str, delay: int, path: Path, advance: Callable[[float], None]) -> float:
    """Run one mode at one delay, and write its episodes; returns their mean return."""
    teacher = open_teacher(config.task, config.agent, config.planner)
    seeds = config.evaluation.seeds
    rows = min(config.evaluation.num_envs, len(seeds))
    agent = arms(teacher, config)[mode, delay](rows, seeds[0])
    result = rollout(agent, teacher.env, seeds, on_step=lambda ended: advance(1))  # type: ignore[arg-type]
    episodes = result.episodes.assign(mode=mode, delay=delay)
    write_csv(path, episodes)
    return float(episodes["return"].mean())


def main(config: DelayConfig) -> None:
    teacher = open_teacher(config.task, config.agent, config.planner)
    check_unseen(
        config.evaluation.seeds,
        [path.parent for path in Path(config.agent).glob("correctors/*/corrector.safetensors")],
    )
    out, parts = Path(config.out) / teacher.task, Path(config.out) / "parts" / teacher.task
    claim(parts, asdict(config), MAY_CHANGE)
    files = {key: parts / f"{key[0]}_{key[1]}.csv".replace(", ", "_") for key in arms(teacher, config)}
    missing = {
        f"{mode}, {delay} late": (config, mode, delay, path)
        for (mode, delay), path in files.items()
        if not path.exists()
    }
    with Progress(Console()) as progress:
        workers = Workers.of(config.workers, "cpu", progress)
        for name, mean in workers.map("late plans", run, missing, task=config.task):
            progress.print(f"{name}: mean return {mean:.1f}")
    write_csv(out.with_suffix(".csv"), pd.concat([pd.read_csv(path) for path in files.values()]))
    write_json(
        out.with_suffix(".json"),
        {
            **provenance(),
            "teacher": teacher.fingerprint,
            "planner": asdict(teacher.planner),
            "precision": teacher.precision,
            "config": asdict(config),
        },
    )


if __name__ == "__main__":
    cli.run(DelayConfig, main)
