"""`tdmpc2 evaluate` by the name that the original has."""

from tdmpc2.cli import run
from tdmpc2.commands import evaluate

if __name__ == "__main__":
    run(evaluate.Settings, evaluate.main)
