"""Evaluate an accelerated agent in a world that is not as modelled, beside replanning at every step.

    tdmpc2 perturb agent=accelerated/walker-walk eval_episodes=10

Pushes, noisy observations, other masses and other friction, at a few strengths each.
"""

from rich.console import Console
from rich.table import Table

from ..evaluation.disturbed import DisturbedConfig as Settings
from ..evaluation.disturbed import evaluate_disturbed
from ..evaluation.metrics import with_interval


def main(settings: Settings) -> None:
    console = Console()
    table = Table("disturbance", "mode", "return", "ratio to replanning [95 %]", "planner calls", "fallbacks")
    for row in evaluate_disturbed(settings, console).itertuples():
        ratio = with_interval(row.return_ratio, row.return_ratio_low, row.return_ratio_high)
        cells = [f"{row.kind} {row.strength}", row.mode, f"{row.return_mean:.1f}", ratio]
        table.add_row(*cells, f"{row.planner_calls:.1%}", f"{row.fallbacks:.1%}")
    console.print(table)
