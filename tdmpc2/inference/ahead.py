"""A function that is compiled into a library once, which later processes load without the compiler.

Loading PyTorch's compiler and tracing a function takes seconds at every start, though what it makes is
cached. A library that was compiled ahead of time (AOTInductor) takes milliseconds. Its name is made of all
that it depends on; `libraries` says where it is kept.
"""

import hashlib
import inspect
import platform
import warnings
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten

from .compiled import OPTIONS, announced, stays_uncompiled
from .libraries import Run, library


def _digest(path: str | Path) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


PACKAGE = Path(__file__).parents[1]
# Read when it is imported: what is on disk later may not be what runs.
SOURCES = {str(path): _digest(path) for path in PACKAGE.rglob("*.py")}
# What every compiled function may call. Its own file, and those of the types it reads, are added to these.
CALLED = (
    "inference/ahead",
    "inference/compiled",
    "inference/fast_model",
    "inference/weights",
    "refine",
    "world_model/layers",
    "world_model/model",
    "world_model/two_hot",
)
VERSIONED = ("builtins", "torch")  # code that `_machine` names the version of


class AheadOfTime:
    """`function`, compiled; eager where this machine cannot compile, after one line that says so.

    Without gradients, and on CPUs only. One library serves a batch of one, a second one every larger batch.

    Args:
        function: a method or function that takes and gives tensors and tuples of tensors, of which some may
            be None. The batch is the first axis of all positional arguments; keyword arguments do not
            depend on it, and are laid out alike in every call.
        result: makes a tuple of tensors what `function` returns.
        what: name of the function in messages.
        modules: whose weights `function` reads. Changes in place are followed; other tensors must be
            arguments.
        depends_on: all else that it reads: values whose `repr` tells them apart.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        result: Callable[[list[Tensor]], Any],
        *,
        what: str,
        modules: Sequence[nn.Module] = (),
        depends_on: object,
    ):
        self._function, self._result, self._what, self._depends_on = function, result, what, depends_on
        self._caller = _Caller(function, modules)
        named = [*self._caller.named_parameters(), *self._caller.named_buffers()]
        self._weights: dict[str, Tensor] = dict(named)
        self._runs: dict[tuple[bool, int], Run | None] = {}  # None: eager

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # A library takes for granted that its inputs are laid out as those were that it was compiled with.
        varying = [x.contiguous() for x in tree_leaves(args) if x is not None]
        fixed = [x for x in tree_leaves(kwargs) if x is not None]
        inputs = [*varying, *fixed, *self._weights.values()]
        kind = varying[0].shape[0] > 1, torch.get_num_threads()  # it is compiled for that many
        if kind not in self._runs:
            self._runs[kind] = self._first_call(args, kwargs, inputs, len(varying) if kind[0] else 0)
        run = self._runs[kind]
        return self._function(*args, **kwargs) if run is None else self._result(run(inputs))

    def __getstate__(self) -> dict[str, Any]:
        """For copies: they open their libraries anew."""
        return {**self.__dict__, "_runs": {}}

    def _first_call(self, args: Any, kwargs: Any, inputs: list[Tensor], varying: int) -> Run | None:
        """The library for such inputs, the batch being free in the first `varying` of them."""
        leaves, spec = tree_flatten((args, kwargs))
        present = [x is not None for x in leaves]
        layouts = [_layout(x, leave_out=int(i < varying)) for i, x in enumerate(inputs)]
        try:
            key = (self._depends_on, self._code(), [*self._weights], present, layouts, varying, _machine())
            name = hashlib.sha256(repr((key, torch.get_num_threads())).encode()).hexdigest()[:32]
            with announced(self._what):
                return library(name, partial(self._compile, spec, present, inputs, varying))
        except _Baked:
            raise
        except Exception as e:  # of whatever kind: the compiler has many
            stays_uncompiled(self._what, e)
            return None

    def _traced(
        self, spec: TreeSpec, present: list[bool], inputs: list[Tensor], varying: int
    ) -> torch.fx.GraphModule:
        """The function's operations; takes and gives lists of tensors, as a library does."""

        def flat(inputs: list[Tensor]) -> list[Tensor]:
            given = iter(inputs)
            args, kwargs = tree_unflatten([next(given) if p else None for p in present], spec)
            weights = dict(zip(self._weights, given, strict=True))
            result = torch.func.functional_call(self._caller, weights, args, kwargs)
            return [x for x in tree_leaves(result) if x is not None]

        free = {0: torch.export.Dim("batch", min=2)}
        shapes = ([free if i < varying else None for i in range(len(inputs))],)
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            graph = torch.export.export(_Caller(flat), (inputs,), dynamic_shapes=(shapes,), strict=False)
        if graph.constants:
            raise _Baked(f"{self._what} reads tensors that are neither arguments nor of its modules")
        return graph.module(check_guards=False)

    def _compile(
        self, spec: TreeSpec, present: list[bool], inputs: list[Tensor], varying: int, folder: Path
    ) -> Path:
        """Compile within `folder`; returns the library."""
        graph = self._traced(spec, present, inputs, varying)
        options = {**OPTIONS, "aot_inductor.precompile_headers": False}
        from torch._inductor.utils import fresh_cache  # takes seconds to import

        # Others may be compiling the same: in a common cache one reads what another has written half.
        with fresh_cache(dir=str(folder)), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # PyTorch's own code brings them on
            made = torch._inductor.aot_compile(graph, (inputs,), options=options)
            return Path(str(made)).rename(folder / "library.so")

    def _code(self) -> list[object]:
        """What is compiled: the function, and the types of what it is of and of the modules it reads."""
        return [
            (self._function.__module__, self._function.__qualname__),
            [(type(m).__module__, type(m).__qualname__) for m in self._owners()],
            [m.training for m in self._caller.modules()],
            [SOURCES.get(path) or _digest(path) for path in self.sources()],
        ]

    def sources(self) -> list[str]:
        """The files whose code is compiled, sorted: a library is made anew where one of them changes."""
        code: set[Any] = {self._function, *(c for owner in self._owners() for c in type(owner).__mro__)}
        own = {inspect.getfile(c) for c in code if c.__module__.split(".")[0] not in VERSIONED}
        return sorted(own | {str(PACKAGE / f"{name}.py") for name in CALLED})

    def _owners(self) -> list[object]:
        return [getattr(self._function, "__self__", None), *self._caller.modules()]


class _Baked(AssertionError):
    """A library would hold the values of tensors for good."""


class _Caller(nn.Module):
    """A function as a module that has the modules which it reads."""

    def __init__(self, function: Callable[..., Any], modules: Sequence[nn.Module] = ()):
        super().__init__()
        self.function, self.modules_read = function, nn.ModuleList(modules)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


def _layout(x: Tensor, leave_out: int) -> tuple[object, ...]:
    """Dtype, and size and stride of every axis but the first ones; of a single entry no stride matters."""
    axes = zip(x.shape[leave_out:], x.stride()[leave_out:], strict=True)
    return x.dtype, [(size, stride if size > 1 else 1) for size, stride in axes]


@lru_cache
def _machine() -> tuple[object, ...]:
    """What every library of a process depends on."""
    capabilities = sorted(torch.cpu.get_capabilities().items())
    return torch.__version__, platform.libc_ver(), capabilities, OPTIONS
