"""A module compiled once into a library, which later processes load without the compiler.

PyTorch's compiler needs seconds at every start to load and to trace a module, even with a warm cache. Loading
a library compiled ahead of time (AOTInductor) takes milliseconds. The library's name is a hash of everything
that it depends on; `libraries` stores it.
"""

import hashlib
import platform
import warnings
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from .compiled import OPTIONS, announced, stays_uncompiled
from .libraries import Run, library
from .sources import sources


class AheadOfTime:
    """`module`, compiled; eager if this machine cannot compile (one line says so).

    Without gradients, and on CPUs only. One library serves batches of one, another all larger batches.

    Args:
        module: takes and returns tensors and tuples of tensors; some may be None. The batch is the first axis
            of all positional arguments. Keyword arguments have no batch axis and the same layout in every
            call. Weights and buffers may change in place. Other attributes must be constants.
        result: turns a list of tensors into the return type of `module`.
        what: name of the module in messages.
    """

    def __init__(self, module: nn.Module, result: Callable[[list[Tensor]], Any], *, what: str):
        self._module, self._result, self._what = module, result, what
        self._weights: dict[str, Tensor] = dict([*module.named_parameters(), *module.named_buffers()])
        self._runs: dict[tuple[bool, int], Run | None] = {}  # None: eager

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # A library requires inputs with the memory layout that it was compiled for.
        varying = [x.contiguous() for x in _tensors(args)]
        fixed = _tensors(tuple(kwargs.values()))
        inputs = [*varying, *fixed, *self._weights.values()]
        kind = varying[0].shape[0] > 1, torch.get_num_threads()  # compiled for this number
        if kind not in self._runs:
            self._runs[kind] = self._first_call(args, kwargs, inputs, len(varying) if kind[0] else 0)
        run = self._runs[kind]
        return self._module(*args, **kwargs) if run is None else self._result(run(inputs))

    def __getstate__(self) -> dict[str, Any]:
        """State for copies, without the libraries: a copy opens its own."""
        return {**self.__dict__, "_runs": {}}

    def _first_call(self, args: Any, kwargs: Any, inputs: list[Tensor], varying: int) -> Run | None:
        """The library for such inputs; the first `varying` of them have a free batch axis."""
        leaves, spec = tree_flatten((args, kwargs))
        present = [x is not None for x in leaves]
        layouts = [_layout(x, leave_out=int(i < varying)) for i, x in enumerate(inputs)]
        try:
            compiling = AheadOfTime._traced, AheadOfTime._compile
            made_of = sources(self._module, *compiling)
            key = made_of, [*self._weights], present, layouts, varying, torch.get_num_threads(), _machine()
            name = hashlib.sha256(repr(key).encode()).hexdigest()[:32]
            with announced(self._what):
                return library(name, partial(self._compile, spec, present, inputs, varying))
        except _Baked:
            raise
        except Exception as e:  # the compiler raises many types
            stays_uncompiled(self._what, e)
            return None

    def _traced(
        self, spec: TreeSpec, present: list[bool], inputs: list[Tensor], varying: int
    ) -> torch.fx.GraphModule:
        """The module's operations as a graph that takes and returns lists of tensors, like a library."""

        def flat(inputs: list[Tensor]) -> list[Tensor]:
            given = iter(inputs)
            args, kwargs = tree_unflatten([next(given) if p else None for p in present], spec)
            weights = dict(zip(self._weights, given, strict=True))
            return _tensors(torch.func.functional_call(self._module, weights, args, kwargs))

        free = {0: torch.export.Dim("batch", min=2)}
        shapes = [free if i < varying else None for i in range(len(inputs))]
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            graph = torch.export.export(Function(flat), (inputs,), dynamic_shapes=((shapes,),), strict=False)
        if graph.constants:
            raise _Baked(f"{self._what} reads tensors that are neither arguments nor its own")
        return graph.module(check_guards=False)

    def _compile(
        self, spec: TreeSpec, present: list[bool], inputs: list[Tensor], varying: int, folder: Path
    ) -> Path:
        """Compile in `folder`; returns the library."""
        # Copies: the compiler takes two inputs that are one tensor in this call for one input in all calls.
        inputs = [x.clone() for x in inputs]
        graph = self._traced(spec, present, inputs, varying)
        options = {**OPTIONS, "aot_inductor.precompile_headers": False}
        from torch._inductor.utils import fresh_cache  # takes seconds to import

        # An own cache: in a shared one, a process may read a file that another has only half written.
        with fresh_cache(dir=str(folder)), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # from PyTorch's own code
            made = torch._inductor.aot_compile(graph, (inputs,), options=options)
            return Path(str(made)).rename(folder / "library.so")


class _Baked(AssertionError):
    """A library would contain tensor values as constants."""


class Function(nn.Module):
    """A function as a module, because only modules can be exported."""

    def __init__(self, function: Callable[..., Any]):
        super().__init__()
        self.function = function

    def forward(self, *args: Any) -> Any:
        return self.function(*args)


def _tensors(given: Any) -> list[Tensor]:
    """The tensors in tuples of tensors and None, in order; faster than PyTorch's `tree_leaves`."""
    if isinstance(given, tuple):
        return [x for part in given for x in _tensors(part)]
    return [] if given is None else [given]


def _layout(x: Tensor, leave_out: int) -> tuple[object, ...]:
    """Dtype, and size and stride of every axis from `leave_out` on; strides of size 1 do not matter."""
    axes = zip(x.shape[leave_out:], x.stride()[leave_out:], strict=True)
    return x.dtype, [(size, stride if size > 1 else 1) for size, stride in axes]


@lru_cache
def _machine() -> tuple[object, ...]:
    """Facts about this machine that every library depends on."""
    capabilities = sorted(torch.cpu.get_capabilities().items())
    return torch.__version__, platform.libc_ver(), capabilities
