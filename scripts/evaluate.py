"""The return of a teacher: python scripts/evaluate.py task=walker-walk checkpoint=FOLDER_OR_FILE.

The planning budget is the one saved with the checkpoint, else the published one, unless
`num_samples=`, `iterations=` or `num_elites=` say otherwise. With `out=FOLDER` the result is
written to `episodes.csv` and `evaluation.json` there.
"""

from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from tdmpc2 import SpeculativeAgent
from tdmpc2.cli import provenance, run
from tdmpc2.config import TEACHER, BudgetOverride, at_least
from tdmpc2.evaluation.rollout import rollout
from tdmpc2.files import atomic_write, write_json
from tdmpc2.teacher import open_teacher


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(BudgetOverride):
    """Everything that `scripts/evaluate.py` can be told."""

    task: str
    checkpoint: str  # an original .pt file or a folder of ours
    episodes: int = 10  # run as one batch
    seed: int = 1000  # of the first episode; the others follow
    device: str = "cpu"
    threads: int | None = None  # of torch; None: its own choice
    out: str = ""  # folder for the result; "" writes nothing


def main(config: EvaluateConfig) -> None:
    at_least(1, config, "episodes")
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    teacher = open_teacher(config.task, config.checkpoint, config, config.device)
    agent = SpeculativeAgent(teacher.agent(config.episodes, config.seed), TEACHER)
    seeds = range(config.seed, config.seed + config.episodes)
    with Progress(transient=True) as progress:
        bar = progress.add_task(config.task, total=None)
        result = rollout(agent, teacher.env, seeds, on_step=lambda done: progress.advance(bar))
    episodes = result.episodes[["seed", "return", "length", "terminated"]]
    returns = episodes["return"]
    budget = asdict(teacher.planner)
    table = Table(title=config.task)
    for name in ("seed", "return", "length"):
        table.add_column(name, justify="right")
    for episode in episodes.itertuples(index=False):
        table.add_row(str(episode[0]), f"{episode[1]:.1f}", str(episode[2]))
    table.add_section()
    table.add_row("mean", f"{returns.mean():.1f}", f"{episodes['length'].mean():.0f}")
    table.add_row("sd", f"{returns.std(ddof=0):.1f}", "")
    console = Console()
    console.print(table)
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
            "settings": asdict(config),
            "planner": budget,
            "teacher": teacher.fingerprint,
            "provenance": provenance(),
        }
        write_json(Path(config.out) / "evaluation.json", result_json)


if __name__ == "__main__":
    run(EvaluateConfig, main)
