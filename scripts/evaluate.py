"""The return of an agent: python scripts/evaluate.py task=walker-walk checkpoint=FOLDER_OR_FILE.

An accelerated agent acts in its mode, a teacher replans at every step; the result says which. The
planning budget is the one saved with the checkpoint, else the published one, unless `num_samples=`,
`iterations=` or `num_elites=` say otherwise. With `out=FOLDER` the result is written to `episodes.csv` and
`evaluation.json` there.
"""

from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from tdmpc2 import SpeculativeAgent
from tdmpc2.agent import read_mode
from tdmpc2.checked import at_least
from tdmpc2.cli import provenance, run
from tdmpc2.config import TEACHER, BudgetOverride, SpeculationConfig
from tdmpc2.evaluation.modes import BASELINE
from tdmpc2.evaluation.rollout import rollout
from tdmpc2.files import atomic_write, in_use, write_json
from tdmpc2.progress import Progress
from tdmpc2.teacher import open_teacher
from tdmpc2.world_model.checkpoint import saved_config


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(BudgetOverride):
    """Everything that `scripts/evaluate.py` can be told."""

    task: str
    checkpoint: str  # a teacher (an original .pt file or a folder of ours) or an accelerated agent
    episodes: int = 10  # run as one batch
    seed: int = 1000  # of the first episode; the others follow
    device: str = "cpu"
    threads: int | None = None  # of torch; None: its own choice
    out: str = ""  # folder for the result; "" writes nothing

    def check_ranges(self) -> None:
        at_least(1, self, "episodes", "threads")
        at_least(0, self, "seed")


def main(config: EvaluateConfig) -> None:
    with in_use(config.out) if config.out else nullcontext():
        evaluate(config)


def evaluate(config: EvaluateConfig) -> None:
    """Run the episodes, print them, and write them to `config.out`."""
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    teacher = open_teacher(config.task, config.checkpoint, config, config.device)
    mode, corrector = read_mode(config.checkpoint, teacher.model)
    name = BASELINE if mode == TEACHER else saved_config(config.checkpoint).get("mode", "speculative")
    agent = SpeculativeAgent(teacher.agent(config.episodes, config.seed), mode, corrector)
    seeds = range(config.seed, config.seed + config.episodes)
    console = Console()
    with Progress(console) as progress, progress.add("evaluating", unit="steps") as stage:
        result = rollout(agent, teacher.env, seeds, on_step=lambda done: stage.advance())
    episodes = result.episodes
    planner_calls = float(episodes["planner_calls"].sum() / episodes["length"].sum())
    returns = episodes["return"]
    budget = asdict(teacher.planner)
    table = Table(title=config.task)
    for column in ("seed", "return", "length", "planner calls"):
        table.add_column(column, justify="right")
    for row in episodes.to_dict("records"):
        calls = f"{row['planner_calls'] / row['length']:.1%}"
        table.add_row(str(row["seed"]), f"{row['return']:.1f}", str(row["length"]), calls)
    table.add_section()
    table.add_row("mean", f"{returns.mean():.1f}", f"{episodes['length'].mean():.0f}", f"{planner_calls:.1%}")
    table.add_row("sd", f"{returns.std(ddof=0):.1f}", "", "")
    console.print(table)
    console.print(f"mode: {name} ({in_words(mode)})")
    console.print(
        "planning budget: {num_samples} samples, {iterations} iterations, {num_elites} elites, "
        "horizon {horizon}".format(**budget)
    )
    if config.out:
        with atomic_write(Path(config.out) / "episodes.csv") as tmp:
            episodes.to_csv(tmp, index=False)
        result_json = {
            "mean": float(returns.mean()),
            "sd": float(returns.std(ddof=0)),
            "planner_calls": planner_calls,
            "mode": name,
            "speculation": asdict(mode),
            "settings": asdict(config),
            "planner": budget,
            "teacher": teacher.fingerprint,
            "provenance": provenance(),
        }
        write_json(Path(config.out) / "evaluation.json", result_json)


def in_words(mode: SpeculationConfig) -> str:
    """What is executed in a mode."""
    steps = mode.execution_horizon
    plans = "a new plan at every step" if steps == 1 else f"{steps} steps a plan"
    words = ["no plans" if mode.plan_length == 0 else plans]
    if mode.corrector:
        words.append(f"corrector {mode.corrector}")
    if mode.refine_steps:
        words.append("refined")
    return ", ".join(words)


if __name__ == "__main__":
    run(EvaluateConfig, main)
