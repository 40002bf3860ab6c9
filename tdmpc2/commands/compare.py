"""Evaluate trained correctors in every mode, compare with the baseline, and save an agent in the chosen mode.

    tdmpc2 compare task=cartpole-swingup checkpoint=pretrained/cartpole-swingup \
        correctors=correctors/cartpole-swingup out=agents/cartpole-swingup

`correctors` is a folder that `tdmpc2 distill` wrote. `out` becomes an agent, as with `tdmpc2 accelerate`.
`tdmpc2.load_agent(out)` loads it; its report is in `out/evaluation`.
"""

from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from ..accelerate import check_room_for_agent, evaluate_correctors, how_to_watch, save_agent
from ..checked import Checked, at_least
from ..config import BudgetOverride, ModelOverride
from ..evaluation.config import EvaluationConfig
from ..files import in_use
from ..progress import Progress
from ..teacher import open_teacher
from ..workers import Workers


@dataclass(frozen=True, kw_only=True)
class Settings(Checked):
    """Which correctors to compare, how, and where to save the agent."""

    task: str
    checkpoint: str  # the teacher: an original .pt file or our folder
    correctors: str  # folder of two_tower/, temporal/, distilled/, or some of them
    out: str  # folder of the agent and its evaluation
    device: str = "cpu"
    workers: int = 0  # processes with one thread each; 0: one per core, on a GPU one in all
    planner: BudgetOverride = field(default_factory=BudgetOverride)
    model: ModelOverride = field(default_factory=ModelOverride)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    def check_ranges(self) -> None:
        at_least(0, self, "workers")


def main(settings: Settings) -> None:
    s, out, correctors = settings, Path(settings.out), Path(settings.correctors)
    check_room_for_agent(out, s.checkpoint)
    with in_use(out), Progress(Console()) as progress:
        teacher = open_teacher(s.task, s.checkpoint, s.planner, s.model, s.device)
        workers = Workers.of(s.workers, s.device, progress)
        evaluate_correctors(teacher, correctors, out / "evaluation", s.evaluation, workers)
        save_agent(out, teacher, out / "evaluation", correctors)
        progress.print(how_to_watch(out, s.task))
