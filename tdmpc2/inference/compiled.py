"""A function that is compiled when it is first called: what is said meanwhile, and what if it fails.

PyTorch caches what the compiler makes on disk, so only the very first start takes long. Where the batch
varies, one compilation serves a batch of one, a second one every larger batch.
"""

import contextlib
import gc
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from ..config import ComputeConfig
from ..errors import ConfigError

OPTIONS: dict[str, str | int | bool | Callable[..., Any]] = {
    "cpp_wrapper": True,  # what calls the kernels is compiled as well
    "cpp_cache_precompile_headers": False,  # preparing them at every start takes longer than they save
    "cpp.vec_isa_ok": True,  # finding out at every start whether the compiler knows this CPU takes a second
    "cpp.enable_floating_point_contract_flag": "fast",  # a product and a sum in one instruction
    "realize_reads_threshold": 32,  # else what lies between a norm and its activation is written to memory
}
PATIENCE = 4.0  # seconds of compiling before it is mentioned
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def dtype_of(compute: ComputeConfig) -> torch.dtype:
    """The dtype that matrix products are computed in; ConfigError where there is no such precision."""
    if compute.precision not in PRECISIONS:
        raise ConfigError(f"precision={compute.precision}: must be one of {', '.join(PRECISIONS)}")
    return PRECISIONS[compute.precision]


@contextlib.contextmanager
def no_garbage_collection() -> Iterator[None]:
    """The compiler makes objects by the million that stay: looking for garbage among them slows a start."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class Compiled:
    """`function`, compiled; eager where this machine cannot compile, after one line that says so.

    Args:
        function: what is compiled.
        what: it is, for people.
        batch_varies: from call to call; it is then the first axis of all positional arguments, which are
            tensors or tuples of tensors, and keyword arguments do not depend on it.
        cuda_graphs: replay recorded kernels instead of launching them one by one; on a GPU only. Results
            are then copies, for the next replay writes where the last one wrote.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        *,
        what: str = "the planner",
        batch_varies: bool = True,
        cuda_graphs: bool = False,
    ):
        self._function, self._what, self._batch_varies = function, what, batch_varies
        with no_garbage_collection():  # this loads the compiler
            if cuda_graphs:
                graphs = torch.compile(function, mode="reduce-overhead")
                self._compiled = lambda *args, **kwargs: tree_map(torch.clone, graphs(*args, **kwargs))
            else:
                self._compiled = torch.compile(function, options=OPTIONS)
        self._called: set[bool] = set()  # with a batch of one; with a larger one

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        tensors: list[Tensor] = tree_leaves(args) if self._batch_varies else []
        is_batch = bool(tensors) and tensors[0].shape[0] > 1
        if is_batch:
            for tensor in tensors:
                torch._dynamo.maybe_mark_dynamic(tensor, 0)
        if is_batch in self._called:
            return self._compiled(*args, **kwargs)
        self._called.add(is_batch)
        return self._first_call(args, kwargs)

    def _first_call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        say = Console(stderr=True).print
        line = f"compiling {self._what}; the result is kept for the next start"
        timer = threading.Timer(PATIENCE, say, [line])
        timer.daemon = True
        timer.start()
        try:
            with no_garbage_collection(), torch._dynamo.config.patch(run_gc_after_compile=False):
                return self._compiled(*args, **kwargs)
        except torch._dynamo.exc.TorchDynamoException as e:
            # The first line may only say which part of the compiler failed.
            reason = " ".join(str(e).split("\n\n")[0].split()) or type(e).__name__
            say(f"{self._what} stays uncompiled, and slower: {reason}")
            self._compiled = self._function
            return self._function(*args, **kwargs)
        finally:
            timer.cancel()
