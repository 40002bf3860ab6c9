"""Measure the return of an agent: tdmpc2 evaluate checkpoint=FOLDER_OR_FILE.

An accelerated agent acts in its mode; a teacher replans at every step. The result names the mode. The
planning budget is saved in the checkpoint, else the published one; settings such as `planner.num_samples=`
change it. With `out=FOLDER` the result goes to `episodes.csv` and `evaluation.json` in this folder.
"""

from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from .. import SpeculativeAgent
from ..checked import Checked, at_least
from ..config import TEACHER, BudgetOverride, ModelOverride
from ..evaluation.modes import BASELINE
from ..evaluation.rollout import rollout
from ..files import atomic_write, in_use, write_json
from ..loading import read_mode
from ..progress import Progress
from ..provenance import provenance
from ..teacher import open_teacher
from ..world_model.checkpoint import read_config


@dataclass(frozen=True, kw_only=True)
class Settings(Checked):
    """Which agent to evaluate, and on how many episodes."""

    task: str | None = None  # None: the checkpoint's own
    checkpoint: str  # an original .pt file, a teacher or an accelerated agent; `checkpoint=` may be left out
    episodes: int = 10  # run as one batch
    seed: int = 1000  # of the first episode; later episodes count up
    device: str = "cpu"
    threads: int | None = None  # PyTorch's; None: its default
    out: str = ""  # folder for the result; "": write nothing
    planner: BudgetOverride = field(default_factory=BudgetOverride)
    model: ModelOverride = field(default_factory=ModelOverride)

    def check_ranges(self) -> None:
        at_least(1, self, "episodes", "threads")
        at_least(0, self, "seed")


def main(settings: Settings) -> None:
    with in_use(settings.out) if settings.out else nullcontext():
        evaluate(settings)


def evaluate(settings: Settings) -> None:
    """Run the episodes, print them, and write them to `settings.out`."""
    s = settings
    if s.threads is not None:
        torch.set_num_threads(s.threads)
    teacher = open_teacher(s.task, s.checkpoint, s.planner, s.model, s.device)
    mode, corrector = read_mode(settings.checkpoint, teacher.model)
    name = BASELINE if mode == TEACHER else read_config(settings.checkpoint).get("mode", "speculative")
    agent = SpeculativeAgent(teacher.agent(settings.episodes, settings.seed), mode, corrector)
    seeds = range(settings.seed, settings.seed + settings.episodes)
    console = Console()
    with Progress(console) as progress, progress.add("evaluating", unit="steps") as stage:
        result = rollout(agent, teacher.env, seeds, on_step=lambda done: stage.advance())
    episodes = result.episodes
    planner_calls = float(episodes["planner_calls"].sum() / episodes["length"].sum())
    returns = episodes["return"]
    table = Table(title=teacher.task)
    for column in ("seed", "return", "length", "planner calls"):
        table.add_column(column, justify="right")
    for row in episodes.to_dict("records"):
        calls = f"{row['planner_calls'] / row['length']:.1%}"
        table.add_row(str(row["seed"]), f"{row['return']:.1f}", str(row["length"]), calls)
    table.add_section()
    table.add_row("mean", f"{returns.mean():.1f}", f"{episodes['length'].mean():.0f}", f"{planner_calls:.1%}")
    table.add_row("sd", f"{returns.std(ddof=0):.1f}", "", "")
    console.print(table)
    console.print(f"mode: {name} ({mode.in_words()})")
    console.print(f"planning budget: {teacher.planner.in_words()}")
    if settings.out:
        with atomic_write(Path(settings.out) / "episodes.csv") as tmp:
            episodes.to_csv(tmp, index=False)
        result_json = {
            "mean": float(returns.mean()),
            "sd": float(returns.std(ddof=0)),
            "planner_calls": planner_calls,
            "mode": name,
            "speculation": asdict(mode),
            "settings": asdict(settings),
            "planner": asdict(teacher.planner),
            "teacher": teacher.fingerprint,
            "provenance": provenance(),
        }
        write_json(Path(settings.out) / "evaluation.json", result_json)
