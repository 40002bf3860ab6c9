"""`tdmpc2 distill` by the name of the published layout."""

from tdmpc2.cli import run
from tdmpc2.commands import distill

if __name__ == "__main__":
    run(distill.Settings, distill.main)
