"""The sources of a compiled module as text: equal text gives an equal library."""

import sys
import time
from collections.abc import Callable
from dataclasses import asdict, is_dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

INTERNAL = nn.Module().__dict__.keys()  # attributes that are neither constants nor weights
CONSTANTS = (type(None), bool, int, float, str, tuple, torch.dtype, torch.device)
START = time.time()


def sources(module: nn.Module, *others: Callable[..., Any]) -> list[str]:
    """Constants of `module` and its submodules, and the text of their source files.

    Source files are the files of their classes, and the files that these import from their own package. A
    change of another file, such as the report's, makes no difference.

    Args:
        module: the module to compile.
        others: functions that take part in compiling.

    Raises:
        TypeError: an attribute is not a constant, so two libraries could get the same name.
        RuntimeError: a file has changed since it was loaded.
    """
    found, names = [], [function.__module__ for function in others]
    for path, part in module.named_modules():
        names.append(type(part).__module__)
        found.append(f"{path}: {type(part).__qualname__}, training={part.training}")
        if part._forward_hooks or part._forward_pre_hooks:
            raise TypeError(f"{path} has hooks, whose code is not known")
        for name, value in part.__dict__.items():
            if name not in INTERNAL:
                found.append(f"{path}.{name}: {_constant(f'{path}.{name}', value)}")
    return found + [_text(name) for name in _with_imports(names)]


def _constant(where: str, value: Any) -> str:
    if is_dataclass(value) and not isinstance(value, type):
        return f"{type(value).__qualname__} {asdict(value)}"
    if not isinstance(value, CONSTANTS):
        raise TypeError(f"{where} is a {type(value).__qualname__}, not a constant")
    return repr(value)


def _with_imports(names: list[str]) -> list[str]:
    """Modules and their imports from the same package, except PyTorch's and Python's."""
    found, waiting = set[str](), [*names]
    for name in waiting:
        package = name.partition(".")[0]
        if name in found or package == "torch" or package in sys.stdlib_module_names:
            continue
        found.add(name)
        for x in vars(sys.modules[name]).values():
            home = x.__name__ if isinstance(x, ModuleType) else getattr(x, "__module__", None)
            if isinstance(home, str) and home.partition(".")[0] == package and home in sys.modules:
                waiting.append(home)
    return sorted(found)


def _text(name: str) -> str:
    file = getattr(sys.modules[name], "__file__", None)
    if file is None:
        raise TypeError(f"{name} has no file")
    if Path(file).stat().st_mtime > START:
        raise RuntimeError(f"{file} has changed since it was loaded")
    return Path(file).read_text(encoding="utf-8")
