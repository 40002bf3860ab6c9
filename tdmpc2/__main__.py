"""`python -m tdmpc2` is the command `tdmpc2`."""

from .commands import main

main()
