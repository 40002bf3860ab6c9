"""`tdmpc2 compare` by the name of the published layout."""

from tdmpc2.cli import run
from tdmpc2.commands import compare

if __name__ == "__main__":
    run(compare.Settings, compare.main)
