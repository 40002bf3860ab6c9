"""How small may refining's search be?

    python research/refining.py agent=accelerated/finger-spin mode=two_tower_24

Runs one mode without refining, and refined with searches of several sizes, on the same seeds. `step.py` takes
the time of each. Writes `results/refining/TASK.csv` and `.json`.
"""

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import pandas as pd
import torch
from modes import corrector_of, evaluated
from rich.console import Console

from tdmpc2 import cli, refine
from tdmpc2.agent import SpeculativeAgent
from tdmpc2.checked import Checked
from tdmpc2.config import BudgetOverride
from tdmpc2.errors import ConfigError
from tdmpc2.evaluation.config import EpisodesConfig
from tdmpc2.evaluation.rollout import rollout
from tdmpc2.evaluation.runs import write_csv
from tdmpc2.files import write_json
from tdmpc2.progress import Progress
from tdmpc2.provenance import provenance
from tdmpc2.teacher import open_teacher


@dataclass(frozen=True, kw_only=True)
class RefiningConfig(Checked):
    """What is compared."""

    agent: str  # the folder of an acceleration
    mode: str = "two_tower_24"
    refine_steps: tuple[int, ...] = (1, 3)
    rows: tuple[int, ...] = (4, 8, 16, 32)  # actions that are valued; the best quarter counts
    out: str = "results/refining"
    planner: BudgetOverride = field(default_factory=BudgetOverride)
    evaluation: EpisodesConfig = field(default_factory=lambda: EpisodesConfig(seed=85_000, num_envs=20))

    def check_ranges(self) -> None:
        if any(rows < 4 or rows % 4 for rows in self.rows):
            raise ConfigError(f"rows={list(self.rows)}: give multiples of 4")


def value(rows: int) -> None:
    """Let refining value so many actions."""
    refine.SAMPLES = max(rows - 2, 0)  # the two given actions are rows, too


def main(config: RefiningConfig) -> None:
    torch.set_num_threads(1)
    teacher = open_teacher(None, config.agent, config.planner)
    folder, out = Path(config.agent), Path(config.out) / teacher.task
    mode = evaluated(folder, config.mode)
    if not mode.corrector or mode.refine_steps:
        raise ConfigError(f"mode={config.mode}: give a mode that corrects, without refining")
    corrector = corrector_of(folder, mode, teacher.fingerprint)
    searches = [(0, 0), *((steps, rows) for steps in config.refine_steps for rows in config.rows)]
    seeds, episodes = config.evaluation.seeds, []
    with Progress(Console()) as progress, progress.add("searches", len(searches), unit="searches") as stage:
        for steps, rows in searches:
            value(rows)
            searching = replace(mode, refine_steps=steps)
            agent = SpeculativeAgent(
                teacher.agent(min(config.evaluation.num_envs, len(seeds)), seeds[0]), searching, corrector
            )
            found = rollout(agent, teacher.env, seeds).episodes
            episodes.append(found.assign(refine_steps=steps, rows=rows))
            progress.print(f"{steps} steps, {rows} rows: mean return {found['return'].mean():.1f}")
            stage.advance()
    write_csv(out.with_suffix(".csv"), pd.concat(episodes))
    about = {"planner": asdict(teacher.planner), "precision": teacher.precision}
    write_json(out.with_suffix(".json"), {**about, "config": asdict(config), "provenance": provenance()})


if __name__ == "__main__":
    cli.run(RefiningConfig, main)
