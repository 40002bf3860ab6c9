"""Evaluate trained correctors in every mode beside the baseline, and make an agent of the chosen mode.

    tdmpc2 compare task=cartpole-swingup checkpoint=pretrained/cartpole-swingup \
        correctors=correctors/cartpole-swingup out=agents/cartpole-swingup

`correctors` is a folder that `tdmpc2 distill` wrote. `out` becomes an agent as `tdmpc2 accelerate` leaves it:
`tdmpc2.load_agent(out)` opens it, and its report is in `out/evaluation`.
"""

from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from ..accelerate import check_room_for_agent, evaluate_correctors, save_agent
from ..checked import Checked, at_least
from ..config import BudgetOverride, ModelOverride
from ..evaluation.config import EvaluationConfig
from ..files import in_use
from ..progress import Progress
from ..teacher import open_teacher
from ..workers import Workers


@dataclass(frozen=True, kw_only=True)
class Settings(Checked):
    """Which correctors are compared, how, and where the agent comes."""

    task: str
    checkpoint: str  # of the teacher: an original .pt file or a folder of ours
    correctors: str  # folder of two_tower/, temporal/, distilled/, or some of them
    out: str  # folder of the agent and its evaluation
    device: str = "cpu"
    workers: int = 0  # processes that run episodes, with one thread each; 0: one a core, on a GPU one in all
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
        progress.print(f'Watch it with `tdmpc2 play {out}`; in Python it is tdmpc2.load_agent("{out}").')
