"""Evaluate an accelerated agent in a world that is not as modelled, beside replanning at every step.

    python scripts/eval_disturbed.py agent=accelerated/walker-walk eval_episodes=10

Pushes, noisy observations, other masses and other friction, at a few strengths each.
"""

from rich.console import Console
from rich.table import Table

from tdmpc2 import cli
from tdmpc2.evaluation.disturbed import DisturbedConfig, evaluate_disturbed
from tdmpc2.evaluation.metrics import with_interval


def main(config: DisturbedConfig) -> None:
    console = Console()
    table = Table("disturbance", "mode", "return", "ratio to replanning [95 %]", "planner calls", "fallbacks")
    for row in evaluate_disturbed(config, console).itertuples():
        ratio = with_interval(row.return_ratio, row.return_ratio_low, row.return_ratio_high)
        cells = [f"{row.kind} {row.strength}", row.mode, f"{row.return_mean:.1f}", ratio]
        table.add_row(*cells, f"{row.planner_calls:.1%}", f"{row.fallbacks:.1%}")
    console.print(table)


if __name__ == "__main__":
    cli.run(DisturbedConfig, main)
