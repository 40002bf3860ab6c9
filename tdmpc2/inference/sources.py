"""What a module is compiled from, as text: where the text is the same, so is what is compiled.

That is its constants, and the code that it may run. Code is found by name, from `forward` on: functions among
the globals and closures of the code that names them, methods in every class that was met. A name may lead to
code that never runs. Only a computed name, as of `getattr`, hides code that does. What is compared is
bytecode: comments and docstrings make no difference, nor does what is on disk by now.
"""

import inspect
import operator
import sys
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from enum import Enum
from types import CodeType, EllipsisType, FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

PLAIN = int | float | complex | str | bytes | slice | EllipsisType | Enum | torch.dtype | torch.device
VERSIONED = {"torch", *sys.stdlib_module_names}  # a version stands for their code
INTERNAL = nn.Module().__dict__.keys()  # attributes that are neither constants nor weights
# What is run or read of a class though nothing names it.
RUN = {name for name, x in vars(operator).items() if name.startswith("__") and callable(x)}
RUN |= {"forward", "__iter__", "__next__", "__len__", "__bool__", "__enter__", "__exit__", "_fields"}
MAKING = ("__new__", "__init__", "__post_init__")  # run where a class is named
WRAPPED = ("__wrapped__", "__func__", "__self__", "fget", "func", "args", "keywords")  # in partials and so on


def sources(module: nn.Module, arguments: object, *others: Callable[..., Any]) -> list[str]:
    """Constants of `module` and all modules in it, and the code that they, and `others`, may run.

    Args:
        module: in training mode or not, which counts.
        arguments: such as it is called with, for their types.
        others: functions that take part in compiling.

    Raises:
        TypeError: an attribute, or what a name in the code stands for, is neither constant nor code.
    """
    walk = _Walk()
    for path, part in module.named_modules():
        hooks = [*part._forward_hooks.values(), *part._forward_pre_hooks.values()]
        own = {name: value for name, value in part.__dict__.items() if name not in INTERNAL}
        for name, value in {"": type(part), "training": part.training, "hooks": hooks, **own}.items():
            walk.meet(f"{path}.{name}", value)
    walk.meet("compiling", others)
    waiting = [arguments]
    for x in waiting:
        walk.meet("argument", type(x))
        waiting += x.values() if isinstance(x, dict) else x if isinstance(x, tuple) else []
    return walk.to_the_end()


def constant(x: object) -> str | None:
    """A constant as text that tells it apart from all others; None where `x` is none."""
    if is_dataclass(x) and not isinstance(x, type):
        x = _name(x), [(f.name, getattr(x, f.name)) for f in fields(x)]
    if not isinstance(x, tuple | list | dict | set | frozenset):
        return repr(x) if x is None or isinstance(x, PLAIN) else None
    parts = [constant(part) for part in (x.items() if isinstance(x, dict) else x)]
    if isinstance(x, set | frozenset):
        parts.sort(key=str)
    return None if None in parts else str(parts)


class _Walk:
    """All that is reached by name."""

    def __init__(self) -> None:
        self._found = set[str]()  # as text
        self._waiting: list[tuple[str, Any]] = []  # what is to be looked into, and where it was met
        self._seen: dict[object, Any] = {}
        self._names, self._spaces = set(RUN), list[type | ModuleType]()

    def meet(self, where: str, x: Any) -> None:
        """What a name stands for."""
        text = constant(x)
        self._found.add(f"{where}: {_name(x) if text is None else text}")
        if text is None:
            self._waiting.append((where, x))
        elif is_dataclass(x):
            self._waiting.append((where, type(x)))

    def to_the_end(self) -> list[str]:
        """All that is found, sorted."""
        while self._waiting:
            while self._waiting:
                self._look_into(*self._waiting.pop())
            for space in self._spaces:
                for name in vars(space).keys() & self._names:
                    if (id(space), name) not in self._seen:
                        self._seen[id(space), name] = space
                        self.meet(f"{_name(space)}.{name}", vars(space)[name])
        return sorted(self._found)

    def _look_into(self, where: str, x: Any) -> None:
        if id(x) in self._seen or isinstance(x, Tensor):  # such tensors are refused when tracing
            return
        self._seen[id(x)] = x
        if isinstance(x, type | ModuleType):
            homes = inspect.getmro(x) if isinstance(x, type) else [x]
            self._spaces += [home for home in homes if not _versioned(home)]
        elif isinstance(x, FunctionType) and not _versioned(x):
            self._function(x)
        elif isinstance(x, tuple | list | dict | set):
            for part in x.items() if isinstance(x, dict) else x:
                self.meet(where, part)
        elif not _versioned(type(x)):
            raise TypeError(f"{where} is a {_name(x)}: neither a constant nor code nor of the module")
        for name in WRAPPED:
            if hasattr(x, name):
                self.meet(where, getattr(x, name))

    def _function(self, f: FunctionType) -> None:
        names = set[str]()
        self._found.add(f"{_name(f)}: {_text(f.__code__, f.__doc__, names)}")
        self._names |= names.difference(MAKING)
        near = {name: f.__globals__[name] for name in names & f.__globals__.keys()}
        near |= {n: c.cell_contents for n, c in zip(f.__code__.co_freevars, f.__closure__ or (), strict=True)}
        for name, x in {**near, "defaults": (f.__defaults__, f.__kwdefaults__)}.items():
            self.meet(f"{_name(f)}: {name}", x)
            if isinstance(x, type) and name != "__class__":  # which `super()` reads
                self._waiting += [(name, vars(c).get(making)) for c in inspect.getmro(x) for making in MAKING]


def _text(code: CodeType, doc: str | None, names: set[str]) -> str:
    """Bytecode with its constants; `names` is given all that it reads."""
    names |= {*code.co_names}
    consts = [x for x in code.co_consts if doc is None or x != doc]
    texts = [_text(x, None, names) if isinstance(x, CodeType) else constant(x) for x in consts]
    return repr((code.co_code, code.co_names, code.co_varnames, code.co_freevars, texts))


def _name(x: Any) -> str:
    """Of a module, a class or a function; else of the type."""
    if isinstance(x, ModuleType):
        return x.__name__
    x = x if hasattr(x, "__qualname__") else type(x)
    return f"{getattr(x, '__module__', '')}.{x.__qualname__}"


def _versioned(x: Any) -> bool:
    """Whether code is that of Python or PyTorch."""
    home = x.__globals__.get("__name__", "") if isinstance(x, FunctionType) else _name(x)
    return home.split(".")[0] in VERSIONED
