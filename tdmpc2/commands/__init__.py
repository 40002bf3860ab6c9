"""The command line: `tdmpc2 VERB key=value ...`.

Each verb is a module in this folder. It has `Settings`, a dataclass whose comments are the help text, and
`main`, which takes the settings.
"""

import importlib
import sys
from difflib import get_close_matches

from ..checked import types
from ..cli import fail, run
from ..version import __version__

VERBS = {
    "accelerate": "accelerate a checkpoint: collect data, train correctors, compare modes, save the agent",
    "play": "show an agent in a window, or write a GIF",
    "evaluate": "measure the return of a teacher or an accelerated agent",
    "export": "export an agent to ONNX, with a program that needs NumPy and ONNX Runtime only",
    "info": "describe a checkpoint: task, sizes, planning budget, mode, provenance",
    "train": "train a teacher online; with the published settings this takes days on a CPU",
    "collect": "step 1 of accelerate: collect episodes that the teacher labels",
    "distill": "step 2 of accelerate: train correctors on this data",
    "compare": "step 3 of accelerate: evaluate all modes, and save an agent in the chosen mode",
    "perturb": "evaluate an accelerated agent in perturbed worlds",
    "tasks": "list the built-in tasks",
}
# The setting that a bare path means.
BY_PATH = {"play": "agent", "export": "agent", "info": "agent", "perturb": "agent", "evaluate": "checkpoint"}
HELP = (
    "usage: tdmpc2 VERB key=value ...\n\n{verbs}\n\n`tdmpc2 VERB --help` lists the settings of a verb, "
    "`tdmpc2 --version` prints the version."
)


def main() -> None:
    """The console command."""
    verb, *arguments = sys.argv[1:] or ["--help"]
    if verb == "--version":
        print(__version__)
        return
    if verb in ("-h", "--help", "help"):
        print(HELP.format(verbs="\n".join(f"  {name:12}{what}" for name, what in VERBS.items())))
        return
    if verb not in VERBS:
        near = get_close_matches(verb, VERBS, n=1)
        hint = f"did you mean {near[0]}?" if near else "`tdmpc2 --help` lists all"
        fail(f"error: {verb!r} is not a verb; {hint}")
    module = importlib.import_module(f".{verb}", __name__)
    names = [*types(module.Settings)]
    if arguments and verb in BY_PATH and not _is_setting(arguments[0], names):
        arguments[0] = f"{BY_PATH[verb]}={arguments[0]}"
    sys.argv = [f"tdmpc2 {verb}", *arguments]
    run(module.Settings, module.main)


def _is_setting(argument: str, names: list[str]) -> bool:
    """Whether `argument` is an option or `key=value`, not a path with an `=`; `names`: settings and parts."""
    name, equals, _ = argument.partition("=")
    setting = name.isidentifier() or name.partition(".")[0] in names
    of_hydra = name.startswith(("hydra.", "hydra/", "+hydra."))
    return argument.startswith("-") or (bool(equals) and (setting or of_hydra))
