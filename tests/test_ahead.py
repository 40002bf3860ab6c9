"""Functions compiled ahead of time: what a library depends on, where it is kept, and what is never opened."""

import copy
import importlib
import os
import pickle
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from filelock import FileLock
from torch import Tensor, nn

import tdmpc2.loading
from tdmpc2 import agent as agent_module
from tdmpc2.agent import TDMPC2, SpeculativeAgent
from tdmpc2.config import (
    COMPILED,
    ComputeConfig,
    CorrectorConfig,
    PlannerConfig,
    SpeculationConfig,
    WorldModelConfig,
)
from tdmpc2.corrector import build_corrector
from tdmpc2.inference import AheadOfTime, libraries
from tdmpc2.inference.libraries import ABANDONED, COMPILING, DIGEST, KEPT, library
from tdmpc2.inference.sources import sources
from tdmpc2.world_model import WorldModel

START = """
import sys, torch, tdmpc2
from tdmpc2.inference import AheadOfTime

class Sine(torch.nn.Module):
    def forward(self, x):
        return x.sin()

compiled = AheadOfTime(Sine(), lambda y: y[0], what="it")
print(compiled(torch.ones(1)).item())
print(*(name in sys.modules for name in ("torch._inductor", "torch._dynamo", "gymnasium")))
"""
SIN_OF_1 = torch.ones(1).sin().item()


class Start:
    """Processes that start with a cache of their own, in a folder whose name needs quotes in a shell."""

    def __init__(self, folder: Path):
        self.cache, self.temporary, self.common = (
            folder / name for name in ("it's a cache", "tmp", "common")
        )
        self.script = folder / "start.py"
        self.script.write_text(START)
        self.temporary.mkdir()

    def __call__(self) -> tuple[list[str], str]:
        """Lines on stdout, and stderr."""
        places = {
            "XDG_CACHE_HOME": str(self.cache),
            "TMPDIR": str(self.temporary),
            "TORCHINDUCTOR_CACHE_DIR": str(self.common),
        }
        run = subprocess.run(
            [sys.executable, self.script], capture_output=True, text=True, check=True, env=os.environ | places
        )
        return run.stdout.splitlines(), run.stderr


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Start:
    start = Start(tmp_path_factory.mktemp("start"))
    (value, loaded), said = start()
    assert float(value) == pytest.approx(SIN_OF_1) and loaded == "True True False" and "not kept" not in said
    return start


@pytest.fixture(scope="module")
def compiled(start: Start) -> bytes:
    """A library as it is kept, of the sine."""
    (path,) = (start.cache / "tdmpc2").iterdir()
    return path.read_bytes()


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder of libraries that is empty at first, in a process that has opened none."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(libraries, "_opened", {})
    return tmp_path / "tdmpc2"


class Making:
    """Stands for a compiler, and counts how often it is needed."""

    def __init__(self, content: bytes):
        self.content, self.times = content[:-DIGEST], 0

    def __call__(self, folder: Path) -> Path:
        self.times += 1
        path = folder / "made.so"
        path.write_bytes(self.content)
        return path

    def open(self, name: str = "sine") -> None:
        """As in a process that has not opened it."""
        libraries._opened.clear()
        assert library(name, self)([torch.ones(1)])[0].item() == pytest.approx(SIN_OF_1)


def test_a_start_loads_no_compiler_and_leaves_nothing(start: Start) -> None:
    """Nor does it load Gymnasium: each takes seconds."""
    (value, loaded), said = start()
    assert float(value) == pytest.approx(SIN_OF_1) and loaded == "False False False" and not said
    (kept,) = (start.cache / "tdmpc2").iterdir()
    assert kept.suffix == ".pt2" and stat.S_IMODE(kept.stat().st_mode) == 0o600
    assert not [
        path for place in (start.temporary, start.common) for path in place.rglob("*") if path.is_file()
    ]


def test_all_agents_of_a_process_share_a_library(cache: Path, compiled: bytes) -> None:
    making = Making(compiled)
    assert library("sine", making) is library("sine", making)
    making.open()
    assert making.times == 1


def test_of_several_processes_one_makes_a_library(cache: Path, compiled: bytes) -> None:
    making = Making(compiled)
    cache.mkdir(mode=0o700)
    with FileLock(cache / "sine.lock"):  # another process makes it
        waiting = threading.Thread(target=making.open)
        waiting.start()
        waiting.join(0.5)
        assert waiting.is_alive()
        libraries._keep("sine", making.content)
    waiting.join(10)
    assert not waiting.is_alive() and not making.times
    assert [path.name for path in cache.iterdir()] == ["sine.pt2"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda x: x[: len(x) // 2],
        lambda x: x[:-1],
        lambda x: b"",
        lambda x: x[:5000] + bytes([x[5000] ^ 1]) + x[5001:],
        lambda x: x[:-1] + bytes([x[-1] ^ 1]),
        lambda x: b"\0" * len(x),
    ],
)
def test_a_damaged_library_is_not_opened_but_made_anew(
    cache: Path, compiled: bytes, damage: Callable
) -> None:
    making = Making(compiled)
    making.open()
    (path,) = cache.iterdir()
    path.unlink()  # this process has it in use
    path.write_bytes(damage(compiled))
    making.open()
    assert making.times == 2 and path.read_bytes() == compiled
    making.open()
    assert making.times == 2


def elsewhere(monkeypatch: pytest.MonkeyPatch, path: Path, owner: int) -> None:
    """`path` belongs to another user: tests may not give files away."""
    here, lstat, fstat = path.lstat().st_ino, Path.lstat, os.fstat

    def given(status: os.stat_result) -> os.stat_result:
        if status.st_ino != here:
            return status
        return os.stat_result([*status[:4], owner, *status[5:10]])

    monkeypatch.setattr(Path, "lstat", lambda self: given(lstat(self)))
    monkeypatch.setattr(os, "fstat", lambda file: given(fstat(file)))


def linked(path: Path) -> None:
    target = path.with_name("target")
    path.rename(target)
    path.symlink_to(target)


OTHER = os.geteuid() + 1
UNSAFE: dict[str, Callable[[pytest.MonkeyPatch, Path], None]] = {
    "the folder of another user": lambda m, cache: elsewhere(m, cache, OTHER),
    "a folder above of another user": lambda m, cache: elsewhere(m, cache.parent, OTHER),
    "the library of another user": lambda m, cache: elsewhere(m, cache / "sine.pt2", OTHER),
    "the superuser's folder": lambda m, cache: (
        m.setattr(os, "geteuid", lambda: OTHER),
        elsewhere(m, cache, 0),
    )[0],
    "others write to the folder": lambda m, cache: cache.chmod(0o707),
    "a group writes to the folder": lambda m, cache: cache.chmod(0o770),
    "others write to it, as in /tmp": lambda m, cache: cache.chmod(0o1777),
    "others write to a folder above": lambda m, cache: cache.parent.chmod(0o777),
    "others write to the library": lambda m, cache: (cache / "sine.pt2").chmod(0o666),
    "the folder is a link": lambda m, cache: linked(cache),
    "the library is a link": lambda m, cache: linked(cache / "sine.pt2"),
    "a relative path": lambda m, cache: (
        m.chdir(cache.parent),
        m.setenv("XDG_CACHE_HOME", "."),
        m.setenv("HOME", str(cache.parent / "home")),
    )[0],
}


@pytest.mark.parametrize("how", UNSAFE)
def test_a_library_that_others_could_have_put_there_is_not_opened(
    how: str, cache: Path, compiled: bytes, monkeypatch, capsys
) -> None:
    making = Making(compiled)
    making.open()
    making.open()
    assert making.times == 1, "as it is left, it is opened"
    UNSAFE[how](monkeypatch, cache)
    making.open()
    assert making.times == 2
    kept = "library" in how or how == "a relative path"  # then the folder itself is good
    assert ("not kept" in capsys.readouterr().err) == (not kept)


def test_folders_above_may_be_links_or_like_tmp(cache: Path, compiled: bytes, monkeypatch) -> None:
    making = Making(compiled)
    making.open()
    cache.parent.chmod(0o1777)
    making.open()
    link = cache.parent / "link"
    link.symlink_to(cache.parent)
    monkeypatch.setenv("XDG_CACHE_HOME", str(link))
    making.open()
    assert making.times == 1


def test_folders_are_made_for_this_user_alone(cache: Path, compiled: bytes, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache.parent / "new" / "folder"))
    before = os.umask(0o002)
    try:
        for _ in range(2):
            making = Making(compiled)
            making.open()
    finally:
        os.umask(before)
    assert making.times == 0, "what it made itself is good"


def test_no_home_is_no_fault(cache: Path, compiled: bytes, monkeypatch, capsys) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home directory")))
    Making(compiled).open()
    assert "no home directory" in capsys.readouterr().err


def test_a_cache_that_is_read_only_is_used(cache: Path, compiled: bytes, monkeypatch, capsys) -> None:
    making, make_file = Making(compiled), tempfile.mkstemp
    making.open()

    def read_only(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("dir", cache) == cache:
            raise OSError(30, "Read-only file system", str(cache))
        return make_file(*args, **kwargs)

    monkeypatch.setattr(tempfile, "mkstemp", read_only)
    monkeypatch.setattr(os, "utime", read_only)
    making.open()
    assert making.times == 1
    making.open("another")
    assert making.times == 2 and "Read-only file system" in capsys.readouterr().err
    assert [path.name for path in cache.iterdir()] == ["sine.pt2"]


def test_a_temporary_folder_that_cannot_be_used_is_not_needed(
    cache: Path, compiled: bytes, monkeypatch
) -> None:
    making = Making(compiled)
    monkeypatch.setattr(tempfile, "tempdir", "/nowhere")
    making.open()
    making.open()
    assert making.times == 1


def test_where_no_code_may_be_run_from_the_cache_it_is_run_from_elsewhere(
    cache: Path, compiled: bytes, monkeypatch, tmp_path: Path
) -> None:
    opener, temporary = torch._C._aoti.AOTIModelContainerRunnerCpu, tmp_path / "tmp"

    def from_elsewhere(path: str, n: int) -> Any:
        if path.startswith(str(cache)):
            raise RuntimeError("failed to map segment from shared object")
        return opener(path, n)

    monkeypatch.setattr(torch._C._aoti, "AOTIModelContainerRunnerCpu", from_elsewhere)
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    making = Making(compiled)
    making.open()
    making.open()
    assert making.times == 1 and not list(temporary.iterdir())


def test_what_is_old_goes_and_what_is_used_stays(cache: Path, compiled: bytes) -> None:
    making = Making(compiled)
    making.open()
    old = cache / "sine.pt2"
    os.utime(old, (0, time.time() - 1.1 * KEPT))
    making.open()
    assert old.stat().st_mtime > time.time() - KEPT, "used now"
    files = {"used.pt2": 0.9 * KEPT, "unused.pt2": 1.1 * KEPT, "half-written": 1.1 * ABANDONED, "new": 0.0}
    for name, age in files.items():
        (cache / name).touch()
        os.utime(cache / name, (0, time.time() - age))
    for name, age in ((COMPILING + "now", 0.9 * ABANDONED), (COMPILING + "killed", 1.1 * ABANDONED)):
        (cache / name).mkdir()
        (cache / name / "file").touch()
        os.utime(cache / name, (0, time.time() - age))
    making.open("another")
    left = {path.name for path in cache.iterdir()}
    assert left == {"sine.pt2", "another.pt2", "used.pt2", "new", COMPILING + "now"}


class Odd(nn.Linear):
    """Of the same weights as its base, and another function."""

    def forward(self, x: Tensor) -> Tensor:
        return -super().forward(x)


class Cosine(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.cos()


def first(y: list[Tensor]) -> Tensor:
    return y[0]


class Shift(nn.Module):
    """Adds to what a module answers."""

    def __init__(self, module: nn.Module, shift: Any):
        super().__init__()
        self.module, self.shift = module, shift

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x) + self.shift


class Shifted:
    """The same, eager and compiled."""

    def __init__(self, module: nn.Module, shift: Any = 0.0):
        self.module, self.run = module, Shift(module, shift)
        self.compiled = AheadOfTime(self.run, first, what="it")


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The library that each function asked for last; none is made."""
    asked: dict[str, str] = {}

    def recorded(name: str, make: Any) -> None:
        asked[make.func.__self__._what] = name
        raise RuntimeError("not compiled in this test")

    monkeypatch.setattr("tdmpc2.inference.ahead.library", recorded)
    return asked


class Minus(nn.Module):
    """Its inputs matter in their order."""

    def forward(self, x: Tensor, y: Tensor) -> list[Tensor]:
        return [x - 2 * y]


@torch.no_grad()
def test_inputs_that_are_one_tensor_at_first_are_two_inputs(cache: Path) -> None:
    """Agents begin so: the predicted latent is the real one."""
    run, x, y = AheadOfTime(Minus(), first, what="it"), torch.randn(2, 3), torch.randn(2, 3)
    torch.testing.assert_close(run(x, x), -x)
    assert run._runs[True, torch.get_num_threads()] is not None
    torch.testing.assert_close(run(x, y), x - 2 * y)


@torch.no_grad()
def test_weights_are_inputs_and_inputs_may_lie_in_memory_in_any_way(cache: Path) -> None:
    one, x = Shifted(nn.Linear(3, 2), 1.0), torch.randn(2, 3)
    torch.testing.assert_close(one.compiled(x), one.run(x))
    assert one.compiled._runs[True, torch.get_num_threads()] is not None
    columns = torch.randn(3, 8)
    for rows in (columns.T.contiguous(), columns.T, columns.T[::2]):
        torch.testing.assert_close(one.compiled(rows), one.run(rows))
    other = Shifted(nn.Linear(3, 2), 1.0)
    torch.testing.assert_close(other.compiled(x), other.run(x))
    assert len(list(cache.iterdir())) == 1, "one library, whatever the weights"
    before = one.compiled(x)
    one.module.weight.add_(1.0)
    torch.testing.assert_close(
        one.compiled(x), before + x.sum(1, keepdim=True), msg="later changes are followed"
    )
    for copied in (copy.deepcopy(one), pickle.loads(pickle.dumps(one))):
        copied.module.weight.add_(1.0)
        torch.testing.assert_close(
            copied.compiled(x), one.run(x) + x.sum(1, keepdim=True), msg="a copy has its own weights"
        )
        assert copied.compiled._runs[True, torch.get_num_threads()] is not None


@torch.no_grad()
def test_all_but_weights_is_in_the_name(names: dict[str, str]) -> None:
    def name_of(module: nn.Module, shift: float = 0.0, x: Tensor | None = None) -> str:
        Shifted(module, shift).compiled(torch.zeros(1, 3) if x is None else x)
        return names["it"]

    name = name_of(nn.Linear(3, 2))
    assert name_of(nn.Linear(3, 2)) == name
    assert name_of(nn.Linear(3, 2), x=torch.zeros(3, 1).T) == name, "inputs are laid out alike"
    assert name_of(nn.Linear(3, 2), x=torch.zeros(2, 3)) == name_of(nn.Linear(3, 2), x=torch.zeros(9, 3))
    others = [
        name_of(nn.Linear(3, 2), 1.0),
        name_of(Odd(3, 2)),
        name_of(nn.Linear(3, 2, bias=False)),
        name_of(nn.Linear(3, 2).eval()),
        name_of(nn.Linear(3, 2).double(), x=torch.zeros(1, 3, dtype=torch.double)),
        name_of(nn.Linear(3, 2), x=torch.zeros(2, 3)),
        name_of(nn.Linear(4, 2), x=torch.zeros(1, 4)),
        name_of(nn.Sequential(nn.Linear(3, 2))),
        name_of(nn.Linear(3, 2), 0),
        name_of(nn.Linear(3, 2), True),
    ]
    assert len({name, *others}) == 1 + len(others)


def test_weights_that_it_does_not_know_of_are_refused(cache: Path) -> None:
    hidden = nn.Linear(3, 2)

    class Reads(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return hidden(x)

    with pytest.raises(AssertionError, match="neither arguments nor its own"):
        AheadOfTime(Reads(), first, what="it")(torch.zeros(1, 3))


def test_what_is_no_constant_stays_uncompiled(names: dict[str, str], capsys) -> None:
    """A library could not be told from one with another value."""
    for odd in (np.ones(2, dtype=np.float32), Making(b"")):
        one = Shifted(nn.Linear(3, 2))
        one.run.odd = odd
        one.compiled(torch.zeros(1, 3))
        assert not names and f".odd is a {type(odd).__name__}, not a constant" in capsys.readouterr().err


def test_without_a_compiler_it_works_all_the_same_and_says_so(cache: Path, capsys) -> None:
    compiled = AheadOfTime(Shift(Cosine(), 41.375), first, what="the planner")
    with torch._inductor.config.patch({"cpp.cxx": (None, "/nowhere/c++")}):
        for _ in range(2):
            assert torch.equal(compiled(torch.zeros(3, 2)), torch.full((3, 2), 42.375))
    said = capsys.readouterr().err.splitlines()
    assert sum(line.startswith("the planner stays uncompiled") for line in said) == 1
    assert not list(cache.iterdir())


SIZES = dict(enc_dim=16, mlp_dim=16, latent_dim=16, num_q=3, num_bins=5)
TASKS: dict[str, Any] = dict(num_tasks=2, task_dim=8, action_dims=(3, 2))


MODEL, BUDGET = WorldModelConfig((5,), 3, **SIZES), PlannerConfig(2, 2, 8, 4, 2)
MODE, CORRECTOR = SpeculationConfig(corrector="two_tower"), CorrectorConfig(16, 3)


def agent_of(
    model: WorldModelConfig = MODEL,
    planner: PlannerConfig = BUDGET,
    mode: SpeculationConfig = MODE,
    corrector: CorrectorConfig = CORRECTOR,
    compute: ComputeConfig = COMPILED,
    discount: float = 0.9,
) -> SpeculativeAgent:
    task = 0 if model.num_tasks else None
    teacher = TDMPC2(WorldModel(model).eval(), planner, discount=discount, task=task, compute=compute)
    return SpeculativeAgent(teacher, mode, build_corrector(corrector).eval())


@pytest.mark.parametrize("tasks", [{}, TASKS])
@pytest.mark.parametrize("architecture", ["two_tower", "temporal", "distilled"])
def test_a_library_depends_on_the_files_that_are_compiled(architecture, tasks, monkeypatch) -> None:
    """All files of the package whose code runs when a module is traced, and none of what is around it."""
    ran: dict[nn.Module, set[str]] = {}

    def traced(self: AheadOfTime, *args: Any, **kwargs: Any) -> Any:
        names = ran.setdefault(self._module, set())
        sys.setprofile(lambda frame, *_: names.add(frame.f_globals["__name__"]))
        try:
            return self._module(*args, **kwargs)
        finally:
            sys.setprofile(None)

    model = WorldModelConfig((5,), 3, **SIZES, episodic=True, **tasks)
    agent = agent_of(
        model, mode=replace(MODE, refine_steps=2), corrector=CorrectorConfig(16, 3, architecture)
    )
    monkeypatch.setattr(AheadOfTime, "__call__", traced)
    agent.act(np.zeros(5))
    agent.act(np.zeros(5))
    assert [type(module).__name__ for module in ran] == ["Iteration", "ControlStep"]
    for module, names in ran.items():
        made_of = sources(module)
        files = {name for name in names if name.startswith("tdmpc2")}
        assert len(files) > 3
        texts = {name: Path(sys.modules[name].__file__).read_text() for name in files}
        assert [name for name, text in texts.items() if text not in made_of] == []
        for other in (agent_module, tdmpc2.loading):
            assert Path(other.__file__).read_text() not in made_of


def test_another_name_for_each_change_of_what_is_compiled_and_for_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {
        "of_user/__init__.py": "",
        "of_user/rule.py": "import torch\nfrom .part import scale\nclass Rule(torch.nn.Module):\n"
        "    def forward(self, x):\n        return scale(x)\n",
        "of_user/part.py": "def scale(x):\n    return 2 * x\n",
        "of_user/report.py": "",
    }

    def made_of(**changes: str) -> list[str]:
        for name, text in {**files, **{f"of_user/{n}.py": text for n, text in changes.items()}}.items():
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text(text)
            os.utime(tmp_path / name, (1, 1))
        for name in [name for name in sys.modules if name.startswith("of_user")]:
            monkeypatch.delitem(sys.modules, name)
        importlib.invalidate_caches()
        return sources(importlib.import_module("of_user.rule").Rule())

    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    usual = made_of()
    assert made_of() == usual
    assert made_of(report="# a comment") == usual
    assert made_of(part="def scale(x):\n    return 3 * x\n") != usual
    assert made_of(rule=files["of_user/rule.py"] + "# a comment") != usual
    rule = made_of() and sys.modules["of_user.rule"].Rule()
    assert sources(rule.eval()) != usual
    handle = rule.register_forward_hook(lambda module, x, y: 2 * y)
    with pytest.raises(TypeError, match="has hooks"):
        sources(rule)
    handle.remove()
    os.utime(tmp_path / "of_user/part.py")
    with pytest.raises(RuntimeError, match=r"part\.py has changed since it was loaded"):
        sources(rule)


BOTH, PLANNER, STEP, NEITHER = (
    {"the planner", "the control step"},
    {"the planner"},
    {"the control step"},
    set[str](),
)
CHANGES: dict[type, dict[str, list[tuple[Any, set[str]]]]] = {
    WorldModelConfig: {
        "obs_shape": [((6,), BOTH)],
        "action_dim": [(2, BOTH)],
        "enc_dim": [(24, BOTH)],
        "num_enc_layers": [(3, BOTH)],
        "num_channels": [(16, BOTH)],
        "mlp_dim": [(24, BOTH)],
        "latent_dim": [(24, BOTH)],
        "num_q": [(2, BOTH)],
        "num_bins": [(7, BOTH)],
        "vmin": [(-5.0, BOTH)],
        "vmax": [(5.0, BOTH)],
        "simnorm_dim": [(4, BOTH)],
        "dropout": [(0.1, BOTH)],
        "log_std_min": [(-5.0, BOTH)],
        "log_std_max": [(1.0, BOTH)],
        "episodic": [(True, BOTH)],
    },
    PlannerConfig: {
        "horizon": [(3, BOTH)],
        "iterations": [(3, NEITHER)],
        "num_samples": [(9, PLANNER)],
        "num_elites": [(5, PLANNER)],
        "num_pi_trajs": [(3, PLANNER)],
        "temperature": [(0.4, BOTH)],
        "min_std": [(0.1, PLANNER)],
        "max_std": [(1.0, PLANNER)],
    },
    SpeculationConfig: {
        "execution_horizon": [(1, STEP), (2, NEITHER), (50, NEITHER)],
        "threshold": [((0.5, 0.7), NEITHER)],
        "refine_steps": [(1, STEP), (2, STEP), (3, STEP)],
        "plan_length": [(0, STEP), (1, STEP), (2, NEITHER)],
        "iterations": [(1, NEITHER)],
    },
    CorrectorConfig: {
        "architecture": [("temporal", STEP), ("distilled", STEP)],
        "width": [(64, STEP)],
        "window": [(4, STEP)],
        "num_layers": [(1, STEP)],
        "num_heads": [(2, STEP)],
        "max_k": [(32, STEP)],
    },
    ComputeConfig: {"precision": [("bfloat16", PLANNER)]},
}
FOLLOWS = {"num_tasks", "task_dim", "action_dims", "corrector", "compile"}  # changed below, or with others


def test_libraries_depend_on_each_setting_of_what_they_compute(names: dict[str, str]) -> None:
    """And on no setting that leaves it as it is: each library takes many seconds to make."""

    def named(agent: SpeculativeAgent) -> dict[str, str]:
        names.clear()
        agent.act(np.zeros(agent.teacher.model.config.obs_shape))
        return dict(names)  # of a mode that never plans, only one

    def changed(agent: SpeculativeAgent) -> set[str]:
        return {what for what, name in named(agent).items() if name != usual[what]}

    usual = named(agent_of())
    assert usual.keys() == BOTH
    own: dict[type, tuple[str, Any]] = {
        WorldModelConfig: ("model", MODEL),
        PlannerConfig: ("planner", BUDGET),
        SpeculationConfig: ("mode", MODE),
        CorrectorConfig: ("corrector", CORRECTOR),
        ComputeConfig: ("compute", COMPILED),
    }
    for config, changes in CHANGES.items():
        assert changes.keys() == {f.name for f in fields(config)} - FOLLOWS - (
            {"latent_dim", "action_dim"} if config is CorrectorConfig else set()
        ), f"of a new setting of {config.__name__} this test has to say what depends on it"
        part, as_usual = own[config]
        for name, values in changes.items():
            for value, expected in values:
                parts: dict[str, Any] = {part: replace(as_usual, **{name: value})}
                if config is WorldModelConfig and name in ("latent_dim", "action_dim"):
                    parts["corrector"] = replace(CORRECTOR, **{name: value})
                assert changed(agent_of(**parts)) == expected, f"{name}={value}"
    assert changed(agent_of(WorldModelConfig((5,), 3, **SIZES, **TASKS))) == BOTH
    assert changed(agent_of(discount=0.8)) == BOTH
    assert changed(agent_of()) == NEITHER
    torch.set_num_threads(2)
    try:
        assert changed(agent_of()) == PLANNER, "a step of one row always has one thread"
    finally:
        torch.set_num_threads(1)
