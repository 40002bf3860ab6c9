"""Evaluate an accelerated agent in perturbed worlds, and compare it with replanning at every step.

    tdmpc2 perturb agent=accelerated/walker-walk evaluation.episodes=10

Perturbations are pushes, noisy observations, other masses and other friction, each at a few strengths.
"""

from rich.console import Console

from ..evaluation.metrics import with_interval
from ..evaluation.perturbed import PerturbedConfig as Settings
from ..evaluation.perturbed import evaluate_perturbed
from ..progress import Progress, Table


def main(settings: Settings) -> None:
    columns = ["world", "mode", "return", "ratio to replanning [95 %]", "planner calls", "fallbacks"]
    rows = []
    with Progress(Console()) as progress:
        for row in evaluate_perturbed(settings, progress).itertuples():
            ratio = with_interval(row.return_ratio, row.return_ratio_low, row.return_ratio_high)
            cells = [f"{row.kind} {row.strength}", row.mode, f"{row.return_mean:.1f}", ratio]
            rows.append([*cells, f"{row.planner_calls:.1%}", f"{row.fallbacks:.1%}"])
        progress.table(Table(columns, rows, words=2))
