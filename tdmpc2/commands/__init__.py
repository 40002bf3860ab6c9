"""The command line: `tdmpc2 VERB key=value ...`.

A verb is a module here. Each has `Settings`, a dataclass whose comments are the help, and `main`, which
receives one.
"""

import importlib
import sys
from difflib import get_close_matches

from ..checked import types
from ..cli import fail, run

VERBS = {
    "accelerate": "make a checkpoint act faster: data, correctors, comparison, the agent that was chosen",
    "play": "show an agent at work, in a window or as a GIF",
    "evaluate": "the return of a teacher or of an accelerated agent",
    "info": "say what a checkpoint is: task, sizes, planning budget, mode, where it is from",
    "train": "train a teacher online; by the published settings that takes days on a CPU",
    "collect": "step 1 of accelerate: episodes that the teacher labels",
    "distill": "step 2 of accelerate: train correctors on them",
    "compare": "step 3 of accelerate: evaluate all modes, and make an agent of the one that is chosen",
    "perturb": "evaluate an accelerated agent in worlds that are not as modelled",
    "tasks": "list the tasks that are built in",
}
HELP = "usage: tdmpc2 VERB key=value ...\n\n{verbs}\n\n`tdmpc2 VERB --help` lists the settings of a verb."


def main() -> None:
    """The console command."""
    verb, *arguments = sys.argv[1:] or ["--help"]
    if verb in ("-h", "--help"):
        print(HELP.format(verbs="\n".join(f"  {name:12}{what}" for name, what in VERBS.items())))
        return
    if verb not in VERBS:
        near = get_close_matches(verb, VERBS, n=1)
        hint = f"did you mean {near[0]}?" if near else "`tdmpc2 --help` lists all"
        fail(f"error: {verb!r} is no verb; {hint}")
    module = importlib.import_module(f".{verb}", __name__)
    names = [*types(module.Settings)]
    if arguments and names[0] == "agent" and not _is_setting(arguments[0], names):
        arguments[0] = f"agent={arguments[0]}"  # a path alone
    sys.argv = [f"tdmpc2 {verb}", *arguments]
    run(module.Settings, module.main)


def _is_setting(argument: str, names: list[str]) -> bool:
    """Whether it is an option or `key=value`; `names` are settings and parts. A path may have an `=` too."""
    name, equals, _ = argument.partition("=")
    setting = name.isidentifier() or name.partition(".")[0] in names
    of_hydra = name.startswith(("hydra.", "hydra/", "+hydra."))
    return argument.startswith("-") or (bool(equals) and (setting or of_hydra))
