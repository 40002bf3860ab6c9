"""`tdmpc2 collect` by the name of the published layout."""

from tdmpc2.cli import run
from tdmpc2.commands import collect

if __name__ == "__main__":
    run(collect.Settings, collect.main)
