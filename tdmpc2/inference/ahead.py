"""A module that is compiled into a library once, which later processes load without the compiler.

Loading PyTorch's compiler and tracing a module takes seconds at every start, though what it makes is
cached. A library that was compiled ahead of time (AOTInductor) takes milliseconds. Its name is made of all
that it depends on; `libraries` says where it is kept.
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
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten

from .compiled import OPTIONS, announced, stays_uncompiled
from .libraries import Run, library
from .sources import sources


class AheadOfTime:
    """`module`, compiled; eager where this machine cannot compile, after one line that says so.

    Without gradients, and on CPUs only. One library serves a batch of one, a second one every larger batch.

    Args:
        module: takes and gives tensors and tuples of tensors, of which some may be None. The batch is the
            first axis of all positional arguments; keyword arguments do not depend on it, and are laid out
            alike in every call. Changes in place of its weights and buffers are followed. Its other
            attributes are constants.
        result: makes a tuple of tensors what `module` returns.
        what: name of the module in messages.
    """

    def __init__(self, module: nn.Module, result: Callable[[list[Tensor]], Any], *, what: str):
        self._module, self._result, self._what = module, result, what
        self._weights: dict[str, Tensor] = dict([*module.named_parameters(), *module.named_buffers()])
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
        return self._module(*args, **kwargs) if run is None else self._result(run(inputs))

    def __getstate__(self) -> dict[str, Any]:
        """For copies: they open their libraries anew."""
        return {**self.__dict__, "_runs": {}}

    def _first_call(self, args: Any, kwargs: Any, inputs: list[Tensor], varying: int) -> Run | None:
        """The library for such inputs, the batch being free in the first `varying` of them."""
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
        except Exception as e:  # of whatever kind: the compiler has many
            stays_uncompiled(self._what, e)
            return None

    def _traced(
        self, spec: TreeSpec, present: list[bool], inputs: list[Tensor], varying: int
    ) -> torch.fx.GraphModule:
        """The module's operations; takes and gives lists of tensors, as a library does."""

        def flat(inputs: list[Tensor]) -> list[Tensor]:
            given = iter(inputs)
            args, kwargs = tree_unflatten([next(given) if p else None for p in present], spec)
            weights = dict(zip(self._weights, given, strict=True))
            result = torch.func.functional_call(self._module, weights, args, kwargs)
            return [x for x in tree_leaves(result) if x is not None]

        free = {0: torch.export.Dim("batch", min=2)}
        shapes = [free if i < varying else None for i in range(len(inputs))]
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            graph = torch.export.export(_Flat(flat), (inputs,), dynamic_shapes=(shapes,), strict=False)
        if graph.constants:
            raise _Baked(f"{self._what} reads tensors that are neither arguments nor its own")
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


class _Baked(AssertionError):
    """A library would hold the values of tensors for good."""


class _Flat(nn.Module):
    """A function as a module, which is what can be exported."""

    def __init__(self, function: Callable[[list[Tensor]], list[Tensor]]):
        super().__init__()
        self.function = function

    def forward(self, inputs: list[Tensor]) -> list[Tensor]:
        return self.function(inputs)


def _layout(x: Tensor, leave_out: int) -> tuple[object, ...]:
    """Dtype, and size and stride of every axis but the first ones; of a single entry no stride matters."""
    axes = zip(x.shape[leave_out:], x.stride()[leave_out:], strict=True)
    return x.dtype, [(size, stride if size > 1 else 1) for size, stride in axes]


@lru_cache
def _machine() -> tuple[object, ...]:
    """What every library of a process depends on."""
    capabilities = sorted(torch.cpu.get_capabilities().items())
    return torch.__version__, platform.libc_ver(), capabilities
