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
from tdmpc2.teacher import open_teacher


@dataclass(frozen=True, kw_only=True)
class EvalCorrectorConfig(BudgetOverride, EvaluationConfig):
    """Everything that this script can be told."""

    task: str
    checkpoint: str  # an original .pt file or a folder of ours
    correctors: str  # folder of two_tower/, temporal/, distilled/, or some of them
    out: str  # folder for the results
    device: str = "cpu"


def main(config: EvalCorrectorConfig) -> None:
    teacher = open_teacher(config.task, config.checkpoint, config, config.device)
    evaluate_correctors(teacher, Path(config.correctors), Path(config.out), config, Console())


if __name__ == "__main__":
    cli.run(EvalCorrectorConfig, main)
