"""List the built-in tasks: tdmpc2 tasks like=walker."""

from dataclasses import dataclass

from ..envs import list_tasks
from ..errors import TaskError


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The tasks to list."""

    like: str = ""  # part of a name; empty: all


def main(settings: Settings) -> None:
    names = [name for name in list_tasks() if settings.like.lower() in name.lower()]
    if not names:
        raise TaskError(f"no built-in task has {settings.like!r} in its name; `tdmpc2 tasks` lists all")
    print("\n".join(names))
