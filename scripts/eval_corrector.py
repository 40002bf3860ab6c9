"""Evaluate trained correctors in every mode beside the baseline, and make an agent of the chosen mode.

    python scripts/eval_corrector.py task=cartpole-swingup checkpoint=pretrained/cartpole-swingup \
        correctors=correctors/cartpole-swingup out=agents/cartpole-swingup

`correctors` is a folder that `scripts/train_corrector.py` wrote. `out` becomes an agent as
`scripts/accelerate.py` leaves it: `tdmpc2.load_agent(out)` opens it, and its report is in `out/evaluation`.
"""

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from tdmpc2 import cli
from tdmpc2.accelerate import check_not_the_teachers, evaluate_correctors, save_agent
from tdmpc2.config import BudgetOverride
from tdmpc2.evaluation.evaluate import EvaluationConfig
from tdmpc2.files import in_use
from tdmpc2.teacher import open_teacher


@dataclass(frozen=True, kw_only=True)
class EvalCorrectorConfig(BudgetOverride, EvaluationConfig):
    """Everything that this script can be told."""

    task: str
    checkpoint: str  # of the teacher: an original .pt file or a folder of ours
    correctors: str  # folder of two_tower/, temporal/, distilled/, or some of them
    out: str  # folder of the agent and its evaluation
    device: str = "cpu"


def main(config: EvalCorrectorConfig) -> None:
    out, correctors, console = Path(config.out), Path(config.correctors), Console()
    check_not_the_teachers(out, config.checkpoint)
    with in_use(out):
        teacher = open_teacher(config.task, config.checkpoint, config, config.device)
        evaluate_correctors(teacher, correctors, out / "evaluation", config, console)
        save_agent(out, teacher, out / "evaluation", correctors)
    console.print(f'done: agent = tdmpc2.load_agent("{out}")')


if __name__ == "__main__":
    cli.run(EvalCorrectorConfig, main)
