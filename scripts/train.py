"""`tdmpc2 train` by the name that the original has."""

from tdmpc2.cli import run
from tdmpc2.commands import train

if __name__ == "__main__":
    run(train.Settings, train.main)
