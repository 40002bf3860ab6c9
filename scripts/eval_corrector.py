"""Evaluate trained correctors in every mode beside the baseline, and write the report.

    python scripts/eval_corrector.py task=cartpole-swingup checkpoint=pretrained/cartpole-swingup \
        correctors=correctors/cartpole-swingup out=evaluation/cartpole-swingup

`correctors` is a folder that `scripts/train_corrector.py` wrote.
"""

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from tdmpc2 import cli
from tdmpc2.accelerate import evaluate_correctors
from tdmpc2.config import BudgetOverride
from tdmpc2.evaluation.evaluate import EvaluationConfig


@dataclass(frozen=True, kw_only=True)
class EvalCorrectorConfig(BudgetOverride, EvaluationConfig):
    """Everything that this script can be told."""

    task: str
    checkpoint: str  # an original .pt file or a folder of ours
    correctors: str  # folder of two_tower/, temporal/ or both
    out: str  # folder for the results
    task_index: int | None = None  # of a multi-task model
    device: str = "cpu"


def main(config: EvalCorrectorConfig) -> None:
    c = config
    evaluate_correctors(
        c.task, c.checkpoint, Path(c.correctors), Path(c.out), c, c, Console(), c.device, c.task_index
    )


if __name__ == "__main__":
    cli.run(EvalCorrectorConfig, main)
