"""Settings that check themselves, whether a user, a script or a file sets them.

@dataclass(frozen=True)
class PlannerConfig(Checked):
    horizon: int = 3

    def check_ranges(self) -> None:
        within(self, 1, 100, "horizon")

PlannerConfig(horizon=0)                          ConfigError: horizon=0: must be from 1 to 100
from_json(PlannerConfig, {"horizon": "3"})        ConfigError: horizon='3': must be of type int

A config may have other configs as parts. In JSON they are objects. An error names a setting as users type it:

from_json(TrainConfig, {"task": "walker-walk", "planner": {"horizon": 0}})
                                                  ConfigError: planner.horizon=0: must be from 1 to 100
"""

import math
import reprlib
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from numbers import Integral, Real
from os import PathLike
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from .errors import ConfigError

T = TypeVar("T")


class Checked:
    """Base of configs; a value of a wrong type or out of range raises ConfigError."""

    def __post_init__(self) -> None:
        cls: Any = type(self)
        for name, hint in types(cls).items():
            check_type(name, getattr(self, name), hint)
        self.check_ranges()

    def check_ranges(self) -> None:
        """Raise ConfigError for an invalid value; the message begins with the setting's name."""


def from_json(cls: type[T], settings: Any) -> T:
    """A config and its parts, from JSON.

    Raises:
        ConfigError: a setting is unknown, missing or invalid.
    """
    if not isinstance(settings, Mapping):
        raise ConfigError(f"{reprlib.repr(settings)} is not a mapping of settings to values")
    kind: Any = cls
    hints = types(kind)
    if unknown := [name for name in settings if name not in hints]:
        raise ConfigError(f"{reprlib.repr(unknown[0])}: there is no such setting")
    values: dict[str, Any] = {}
    for f in fields(kind):
        if f.name not in settings:
            if f.default is MISSING and f.default_factory is MISSING:
                raise ConfigError(f"{f.name} is missing")
            continue
        hint, value = hints[f.name], settings[f.name]
        if is_dataclass(hint) and isinstance(value, Mapping):
            try:
                value = from_json(hint, value)  # type: ignore[arg-type]
            except ConfigError as e:
                raise ConfigError(f"{f.name}.{e}") from e
        values[f.name] = tuple(value) if isinstance(value, list) else value
        check_type(f.name, values[f.name], hint)
    return cls(**values)


def check_type(name: str, value: Any, hint: Any) -> None:
    """Raise ConfigError if a setting's value is not of the type `hint`. NaN does not count as a float."""
    if not _fits(value, hint):
        expected = hint.__name__ if isinstance(hint, type) and not get_args(hint) else hint
        raise ConfigError(f"{name}={reprlib.repr(value)}: must be of type {expected}")


def _fits(value: Any, hint: Any) -> bool:
    if get_origin(hint) in (Union, UnionType):
        return any(_fits(value, option) for option in get_args(hint))
    if get_origin(hint) is tuple and get_args(hint)[-1] is Ellipsis:
        return isinstance(value, tuple) and all(_fits(entry, get_args(hint)[0]) for entry in value)
    if isinstance(value, bool):  # an int in Python
        return hint is bool
    if hint in (int, float) and isinstance(value, Integral):
        return abs(int(value)) < 2**63
    if hint is float:
        return isinstance(value, Real) and not math.isnan(value)
    if hint is str:
        return isinstance(value, str | PathLike)
    return not isinstance(hint, type) or isinstance(value, hint)


@cache
def types(cls: Any) -> dict[str, Any]:
    """Types of a config's fields, by name."""
    hints = get_type_hints(cls)
    return {f.name: hints[f.name] for f in fields(cls)}


def at_least(least: float, config: Any, *names: str) -> None:
    """Raise ConfigError if one of these numbers is below `least`; None means a default and passes."""
    for name in names:
        if getattr(config, name) is not None and not getattr(config, name) >= least:
            raise ConfigError(f"{name}={getattr(config, name)}: must be at least {least}")


def within(config: Any, low: float, high: float, *names: str) -> None:
    """Raise ConfigError if one of these numbers is outside `low` to `high`."""
    for name in names:
        check_range(name, getattr(config, name), low, high)


def check_range(name: str, value: float | None, low: float, high: float) -> None:
    """Raise ConfigError if the value is outside `low` to `high`; None means a default and passes."""
    if value is not None and not low <= value <= high:
        raise ConfigError(f"{name}={value}: must be from {low} to {high}")
