"""Measure the return of an agent: tdmpc2 evaluate checkpoint=FOLDER_OR_FILE.

An accelerated agent acts in its mode; a teacher replans at every step. The result names the mode. The
planning budget is saved in the checkpoint, else the published one; settings such as `planner.num_samples=`
change it. With `out=FOLDER` the result goes to `episodes.csv` and `evaluation.json` in this folder.

With `realtime=true` the world does not wait for the agent. The result is the return against the control
frequency on this machine: of the teacher, of the teacher with half and a quarter of its iterations, of plans
executed for three steps as they are, and of the agent, which plans in the background. `out=FOLDER` then gets
`realtime.csv`, `realtime.json` and the figure `realtime.svg`. Run nothing else meanwhile.
"""

from collections.abc import Callable
from contextlib import closing, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from .. import SpeculativeAgent
from ..background import in_background
from ..checked import Checked, at_least
from ..config import TEACHER, BudgetOverride, ModelOverride, SpeculationConfig
from ..corrector import BaseCorrector
from ..errors import ConfigError
from ..evaluation.modes import BASELINE, simple_modes
from ..evaluation.realtime import FREQUENCIES, draw, realtime
from ..evaluation.rollout import rollout
from ..evaluation.runs import write_csv
from ..files import atomic_write, in_use, write_json
from ..loading import read_mode
from ..progress import Progress
from ..provenance import provenance
from ..teacher import Teacher, open_teacher
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
    realtime: bool = False  # the world does not wait for the agent; return against control frequency
    frequencies: tuple[float, ...] = FREQUENCIES  # agent steps per second, for realtime=true
    out: str = ""  # folder for the result; "": write nothing
    planner: BudgetOverride = field(default_factory=BudgetOverride)
    model: ModelOverride = field(default_factory=ModelOverride)

    def check_ranges(self) -> None:
        at_least(1, self, "episodes", "threads")
        at_least(0, self, "seed")
        if not self.frequencies or min(self.frequencies) <= 0:
            raise ConfigError(f"frequencies={list(self.frequencies)}: give numbers above 0, in Hz")


def main(settings: Settings) -> None:
    with in_use(settings.out) if settings.out else nullcontext():
        (evaluate_in_real_time if settings.realtime else evaluate)(settings)


def _opened(s: Settings) -> tuple[Teacher, SpeculationConfig, BaseCorrector | None, str]:
    """The teacher, and the checkpoint's mode with its corrector and its name."""
    if s.threads is not None:
        torch.set_num_threads(s.threads)
    teacher = open_teacher(s.task, s.checkpoint, s.planner, s.model, s.device)
    mode, corrector = read_mode(s.checkpoint, teacher.model)
    name = BASELINE if mode == TEACHER else read_config(s.checkpoint).get("mode", "speculative")
    return teacher, mode, corrector, name


def evaluate(settings: Settings) -> None:
    """Run the episodes, print them, and write them to `settings.out`."""
    teacher, mode, corrector, name = _opened(settings)
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
        write_csv(Path(settings.out) / "episodes.csv", episodes)
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


def evaluate_in_real_time(settings: Settings) -> None:
    """Run the episodes at each control frequency, print mean returns, and write them to `settings.out`."""
    s = settings
    teacher, mode, corrector, name = _opened(s)
    make_teacher = partial(teacher.agent, 1, s.seed)

    def planning(mode: SpeculationConfig) -> SpeculativeAgent:
        return SpeculativeAgent(make_teacher(), mode)

    iterations = teacher.planner.iterations
    simple = simple_modes(iterations)
    agents: dict[str, Callable[[], SpeculativeAgent]] = {
        "teacher": partial(planning, TEACHER),
        "half of its iterations": partial(planning, simple["half_budget"]),
        "a quarter": partial(planning, replace(TEACHER, iterations=max(iterations // 4, 1))),
        "naive_3": partial(planning, simple["naive_3"]),
    }
    if mode != TEACHER:
        agents[f"{name}, planning in the background"] = partial(in_background, make_teacher, mode, corrector)
    seeds = range(s.seed, s.seed + s.episodes)
    console = Console()
    total = len(agents) * len(s.frequencies) * s.episodes
    with Progress(console) as progress, progress.add("evaluating", total, unit="episodes") as stage:
        episodes = realtime(agents, teacher.env, seeds, s.frequencies, stage.advance)
    means = episodes.groupby(["agent", "hz"], sort=False)[["return", "late"]].mean()
    table = Table(title=f"{teacher.task}: return at a control frequency (share of late steps)")
    table.add_column("Hz", justify="right")
    for name in agents:
        table.add_column(name, justify="right")
    for hz in s.frequencies:
        cells = [means.loc[(name, hz)] for name in agents]
        table.add_row(f"{hz:g}", *(f"{c['return']:.0f} ({c['late']:.0%})" for c in cells))
    console.print(table)
    console.print(f"planning budget: {teacher.planner.in_words()}")
    if s.out:
        out = Path(s.out)
        write_csv(out / "realtime.csv", episodes)
        with closing(teacher.env()) as env:
            own_hz = env.metadata.get("render_fps")
        figure = Figure(figsize=(6.4, 4.0), layout="constrained")
        axes = figure.subplots()
        draw(axes, episodes, teacher.task, own_hz)
        axes.legend(frameon=False)
        with atomic_write(out / "realtime.svg") as tmp:
            figure.savefig(tmp, format="svg")
        about = {
            "settings": asdict(s),
            "planner": asdict(teacher.planner),
            "mode": asdict(mode),
            "teacher": teacher.fingerprint,
            "own_hz": own_hz,
            "threads": torch.get_num_threads(),
            "provenance": provenance(),
        }
        write_json(out / "realtime.json", about)
