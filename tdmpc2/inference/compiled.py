"""Compiling a function at its first call, with options, messages and a fallback to eager."""

import contextlib
import gc
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch.utils._pytree import tree_map

from ..config import ComputeConfig

OPTIONS: dict[str, str | int | bool | Callable[..., Any]] = {
    "cpp_wrapper": True,  # also compile the code that calls the kernels
    "cpp_cache_precompile_headers": False,  # preparing them takes longer than they save
    "cpp.vec_isa_ok": True,  # skip a check of the compiler that takes a second at every start
    "cpp.enable_floating_point_contract_flag": "fast",  # fused multiply-add
    "realize_reads_threshold": 32,  # fuse norm and activation: no intermediate result in memory
}
PATIENCE = 4.0  # seconds of compiling before a message


def resolved(compute: ComputeConfig, device: torch.device) -> ComputeConfig:
    """`compute` with the precision that "auto" means on `device`."""
    if compute.precision != "auto":
        return compute
    fast = computes_in_bfloat16() if device.type == "cpu" else torch.cuda.is_bf16_supported(False)
    return replace(compute, precision="bfloat16" if fast else "float32")


def dtype_of(compute: ComputeConfig, device: torch.device) -> torch.dtype:
    """The dtype of matrix products; warns once if the processor is slow in it."""
    compute = resolved(compute, device)
    if compute.precision == "bfloat16" and device.type == "cpu" and not computes_in_bfloat16():
        _say_slow()
    return getattr(torch, compute.precision)


def computes_in_bfloat16() -> bool:
    """Whether this processor has instructions for matrix products in bfloat16."""
    return any(has for name, has in torch.cpu.get_capabilities().items() if "bf16" in name)


@cache
def _say_slow() -> None:
    say("this processor has no instructions for bfloat16: use precision=float32, which is many times faster")


@contextlib.contextmanager
def announced(what: str) -> Iterator[None]:
    """Print a line if the compilation of `what` in this context takes long."""
    timer = threading.Timer(PATIENCE, say, [f"compiling {what}; the next start will be fast"])
    timer.daemon = True
    timer.start()
    enabled = gc.isenabled()
    gc.disable()  # the compiler makes millions of objects that stay: garbage collection slows it down
    try:
        yield
    finally:
        timer.cancel()
        if enabled:
            gc.enable()


def say(line: str) -> None:
    """Print a line on stderr."""
    print(line, file=sys.stderr)


def stays_uncompiled(what: str, error: Exception) -> None:
    """Print that `what` was not compiled, and why."""
    # The whole first paragraph: its first line may only name a part of the compiler.
    reason = " ".join(str(error).split("\n\n")[0].split()) or type(error).__name__
    say(f"{what} stays uncompiled and is slower: {reason}")


class Compiled:
    """`function`, compiled in this process; eager if that fails (one line says so).

    Args:
        function: the function to compile.
        what: its name in messages.
        device: the device that it computes on.
        cuda_graphs: replay recorded kernels instead of launching each; GPU only. Results are copies, because
            every replay writes to the same memory.
    """

    def __init__(
        self, function: Callable[..., Any], *, what: str, device: torch.device, cuda_graphs: bool = False
    ):
        self._function, self._what, self._cuda_graphs = function, what, cuda_graphs
        # On a GPU, a backward pass with a C++ wrapper does not compile.
        self._options = OPTIONS if device.type == "cpu" else None
        self._compiled: Callable[..., Any] | None = None  # before the first call

    def __getstate__(self) -> dict[str, Any]:
        """State for copies, without the compiled function: a copy compiles its own."""
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
