"""A function that is compiled into a library once, which later processes load without the compiler.

Loading PyTorch's compiler and tracing a function takes seconds at every start, though what it makes is
cached. A library that was compiled ahead of time (AOTInductor) takes milliseconds. Libraries are kept in
`$XDG_CACHE_HOME/tdmpc2`, or `~/.cache/tdmpc2`, under a name that says all they depend on.
"""

import hashlib
import os
import tempfile
import warnings
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten

from .compiled import OPTIONS, announced, stays_uncompiled

Run: TypeAlias = Callable[[list[Tensor]], list[Tensor]]


class AheadOfTime:
    """`function`, compiled; eager where this machine cannot compile, after one line that says so.

    Without gradients, and on CPUs only. One library serves a batch of one, a second one every larger batch.

    Args:
        function: what is compiled. It takes and gives tensors and tuples of tensors, of which some may be
            None. The batch is the first axis of all positional arguments; keyword arguments do not depend
            on it.
        result: makes what `function` gives of its tensors in order.
        what: it is, for people.
        modules: whose weights it reads.
        depends_on: everything else that it reads, such as configurations: its `repr` names them all.
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
        self._weights = dict(self._caller.state_dict(keep_vars=True))
        self._runs: dict[bool, Run] = {}  # with a batch of one; with a larger one
        self._compiles = True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self._compiles:
            return self._function(*args, **kwargs)
        # A library takes for granted that its inputs are laid out as those were that it was compiled with.
        varying = [x.contiguous() for x in tree_leaves(args) if x is not None]
        fixed = [x for x in tree_leaves(kwargs) if x is not None]
        inputs = [*varying, *fixed, *self._weights.values()]
        is_batch = varying[0].shape[0] > 1
        if is_batch not in self._runs:
            try:
                with announced(self._what):
                    self._runs[is_batch] = self._load(args, kwargs, inputs, len(varying) if is_batch else 0)
            except (RuntimeError, OSError) as e:
                stays_uncompiled(self._what, e)
                self._compiles = False
                return self._function(*args, **kwargs)
        return self._result(self._runs[is_batch](inputs))

    def _load(self, args: Any, kwargs: Any, inputs: list[Tensor], varying: int) -> Run:
        """The library for such inputs, the batch being free in the first `varying` of them."""
        leaves, spec = tree_flatten((args, kwargs))
        present = [x is not None for x in leaves]
        layouts = [
            (x.dtype, (*x.shape[free:],), (*x.stride()[free:],))
            for x, free in zip(inputs, [1] * varying + [0] * len(inputs), strict=False)
        ]
        key = repr((self._depends_on, [*self._weights], present, layouts, varying, _machine()))
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tdmpc2"
        path = folder / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.pt2"
        if path.exists():
            try:
                return _open(path)
            except RuntimeError:
                pass  # it is damaged
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as own:  # others may be compiling the same
            made = Path(own) / path.name
            self._compile(made, spec, present, inputs, varying)
            os.replace(made, path)
        return _open(path)

    def _compile(
        self, path: Path, spec: TreeSpec, present: list[bool], inputs: list[Tensor], varying: int
    ) -> None:
        class Flat(nn.Module):
            """Takes and gives lists of tensors, as a library does."""

            def forward(root, inputs: list[Tensor]) -> list[Tensor]:  # noqa: N805  # self is that outside
                given = iter(inputs)
                args, kwargs = tree_unflatten([next(given) if p else None for p in present], spec)
                weights = dict(zip(self._weights, given, strict=True))
                result = torch.func.functional_call(self._caller, weights, args, kwargs)
                return [x for x in tree_leaves(result) if x is not None]

        free = {0: torch.export.Dim("batch", min=2)}
        shapes = [free if i < varying else None for i in range(len(inputs))]
        with torch.no_grad():
            graph = torch.export.export(Flat(), (inputs,), dynamic_shapes={"inputs": shapes}, strict=False)
        if weights := [name for name, x in graph.constants.items() if x.numel() > 1]:
            raise AssertionError(f"not among the modules, and so never to change: {weights}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # PyTorch's own code brings them on
            torch._inductor.aoti_compile_and_package(
                graph, package_path=str(path), inductor_configs={**OPTIONS}
            )


class _Caller(nn.Module):
    """A function as a module that has the modules which it reads."""

    def __init__(self, function: Callable[..., Any], modules: Sequence[nn.Module]):
        super().__init__()
        self.function, self.modules_read = function, nn.ModuleList(modules)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


def _open(path: Path) -> Run:
    # Not `torch._inductor.aoti_load_package`, which loads the compiler and asks it about this machine.
    run: Run = torch._C._aoti.AOTIModelPackageLoader(str(path), "model", False, 1, -1).run
    return run


@lru_cache
def _machine() -> tuple[object, ...]:
    """What the name of a library says of everything that is the same for all of a process."""
    sources = hashlib.sha256()
    for path in sorted(Path(__file__).parents[1].rglob("*.py")):
        sources.update(path.read_bytes())
    capabilities = sorted(torch.cpu.get_capabilities().items())
    return sources.hexdigest(), torch.__version__, capabilities, torch.get_num_threads(), OPTIONS
