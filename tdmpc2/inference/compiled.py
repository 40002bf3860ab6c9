"""Compiling a function when it is first called: how, what is said meanwhile, and what if it fails."""

import contextlib
import gc
import sys
import threading
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
from torch.utils._pytree import tree_map

from ..config import ComputeConfig

OPTIONS: dict[str, str | int | bool | Callable[..., Any]] = {
    "cpp_wrapper": True,  # what calls the kernels is compiled as well
    "cpp_cache_precompile_headers": False,  # preparing them at every start takes longer than they save
    "cpp.vec_isa_ok": True,  # finding out at every start whether the compiler knows this CPU takes a second
    "cpp.enable_floating_point_contract_flag": "fast",  # a product and a sum in one instruction
    "realize_reads_threshold": 32,  # else what lies between a norm and its activation is written to memory
}
PATIENCE = 4.0  # seconds of compiling before it is mentioned


def dtype_of(compute: ComputeConfig, device: torch.device) -> torch.dtype:
    """The dtype of matrix products; says once where the processor would compute in it very slowly."""
    if compute.precision == "bfloat16" and device.type == "cpu" and not computes_in_bfloat16():
        _say_slow()
    return getattr(torch, compute.precision)


def computes_in_bfloat16() -> bool:
    """Whether this processor has instructions for matrix products in bfloat16."""
    return any(has for name, has in torch.cpu.get_capabilities().items() if "bf16" in name)


@cache
def _say_slow() -> None:
    say("this processor has no instructions for bfloat16: precision=float32 is many times faster here")


@contextlib.contextmanager
def announced(what: str) -> Iterator[None]:
    """Around the compilation of `what`: where it takes long, a line says that it is going on."""
    timer = threading.Timer(PATIENCE, say, [f"compiling {what}; the result is kept for the next start"])
    timer.daemon = True
    timer.start()
    enabled = gc.isenabled()
    gc.disable()  # the compiler makes objects by the million that stay: looking for garbage slows it down
    try:
        yield
    finally:
        timer.cancel()
        if enabled:
            gc.enable()


def say(line: str) -> None:
    """A line on stderr, as it is."""
    print(line, file=sys.stderr)


def stays_uncompiled(what: str, error: Exception) -> None:
    """Say so, and why."""
    # The first line may only say which part of the compiler failed.
    reason = " ".join(str(error).split("\n\n")[0].split()) or type(error).__name__
    say(f"{what} stays uncompiled, and slower: {reason}")


class Compiled:
    """`function`, compiled in this process; eager where that cannot be, after one line that says so.

    Args:
        function: what is compiled.
        what: it is, for people.
        device: that it computes on.
        cuda_graphs: replay recorded kernels instead of launching them one by one; on a GPU only. Results
            are then copies, for the next replay writes where the last one wrote.
    """

    def __init__(
        self, function: Callable[..., Any], *, what: str, device: torch.device, cuda_graphs: bool = False
    ):
        self._function, self._what, self._cuda_graphs = function, what, cuda_graphs
        # On a GPU the backward pass of what has a C++ wrapper does not compile.
        self._options = OPTIONS if device.type == "cpu" else None
        self._compiled: Callable[..., Any] | None = None  # before the first call

    def __getstate__(self) -> dict[str, Any]:
        """For copies: they compile anew."""
        return {**self.__dict__, "_compiled": None}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._compiled is not None:
            return self._compiled(*args, **kwargs)
        if self._cuda_graphs:
            graphs = torch.compile(self._function, mode="reduce-overhead")
            self._compiled = lambda *args, **kwargs: tree_map(torch.clone, graphs(*args, **kwargs))
        else:
            self._compiled = torch.compile(self._function, options=self._options)
        try:
            with announced(self._what), torch._dynamo.config.patch(run_gc_after_compile=False):
                return self._compiled(*args, **kwargs)
        except torch._dynamo.exc.TorchDynamoException as e:
            stays_uncompiled(self._what, e)
            self._compiled = self._function
            return self._function(*args, **kwargs)
