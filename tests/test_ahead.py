"""Functions compiled ahead of time: what a library depends on, and what happens where there is none."""

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import tdmpc2
from tdmpc2.agent import TDMPC2, SpeculativeAgent
from tdmpc2.config import COMPILED, CorrectorConfig, PlannerConfig, SpeculationConfig, WorldModelConfig
from tdmpc2.corrector import build_corrector
from tdmpc2.inference import AheadOfTime
from tdmpc2.inference.ahead import KEPT
from tdmpc2.world_model import WorldModel


@pytest.fixture(autouse=True)
def libraries(monkeypatch, tmp_path: Path) -> Path:
    """The folder of libraries, empty at first."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "tdmpc2"


class Odd(nn.Linear):
    """Of the same weights as its base, and another function."""

    def forward(self, x: Tensor) -> Tensor:
        return -super().forward(x)


def ahead_of(module: nn.Module, shift: float = 0.0) -> AheadOfTime:
    return AheadOfTime(
        lambda x: module(x) + shift, lambda y: y[0], what="it", modules=[module], depends_on=shift
    )


@torch.no_grad()
def test_weights_are_inputs_and_all_else_is_in_the_name(libraries: Path) -> None:
    one, other, x = nn.Linear(3, 2), nn.Linear(3, 2), torch.randn(1, 3)
    for module, shift in ((one, 0.0), (other, 0.0), (one, 1.0)):
        torch.testing.assert_close(ahead_of(module, shift)(x), module(x) + shift)
    assert len(list(libraries.iterdir())) == 2, "one for each shift, whatever the weights"
    compiled = ahead_of(one)
    before = compiled(x)
    one.weight.add_(1.0)
    torch.testing.assert_close(compiled(x), before + x.sum(), msg="later changes are followed")
    odd = Odd(3, 2)
    torch.testing.assert_close(ahead_of(odd)(x), odd(x), msg="a type of its own, a library of its own")


@torch.no_grad()
def test_inputs_may_lie_in_memory_in_any_way() -> None:
    module, x = nn.Linear(3, 2), torch.randn(3, 8)
    compiled = ahead_of(module)
    for rows in (x.T.contiguous(), x.T, x.T[::2], x.T[:1]):
        torch.testing.assert_close(compiled(rows), module(rows))


def test_weights_that_it_does_not_know_of_are_refused() -> None:
    hidden = nn.Linear(3, 2)
    with pytest.raises(AssertionError, match="neither arguments nor of its modules"):
        AheadOfTime(lambda x: hidden(x), lambda y: y[0], what="it", depends_on="")(torch.zeros(1, 3))


@torch.no_grad()
def test_a_damaged_library_is_made_anew_and_an_unused_one_goes(libraries: Path) -> None:
    module, x = nn.Linear(3, 2), torch.randn(1, 3)
    libraries.mkdir()
    used, unused = (libraries / f"{name}.pt2" for name in ("used", "unused"))
    for path, age in ((used, 0.9 * KEPT), (unused, 1.1 * KEPT)):
        path.touch()
        os.utime(path, (0, time.time() - age))
    ahead_of(module)(x)
    assert used.exists() and not unused.exists()
    used.unlink()
    (library,) = libraries.iterdir()
    os.utime(library, (0, 0))
    ahead_of(module)(x)
    assert library.stat().st_mtime > time.time() - KEPT, "used now"
    whole = library.read_bytes()
    library.write_bytes(whole[: len(whole) // 2])
    torch.testing.assert_close(ahead_of(module)(x), module(x))
    assert library.stat().st_size > len(whole) // 2


@pytest.mark.parametrize("tasks", [{}, dict(num_tasks=2, task_dim=8, action_dims=(3, 2))])
@pytest.mark.parametrize("architecture", ["two_tower", "temporal", "distilled"])
def test_a_library_depends_on_the_sources_that_are_compiled(architecture, tasks, monkeypatch) -> None:
    """All code of the package that runs when a function is traced is in its sources; no other is."""
    ran: dict[AheadOfTime, set[str]] = {}

    def traced(self: AheadOfTime, *args: Any, **kwargs: Any) -> Any:
        paths = ran.setdefault(self, set())
        sys.setprofile(lambda frame, *_: paths.add(frame.f_code.co_filename))
        try:
            return self._function(*args, **kwargs)
        finally:
            sys.setprofile(None)

    monkeypatch.setattr(AheadOfTime, "__call__", traced)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    sizes = dict(enc_dim=16, mlp_dim=16, latent_dim=16, num_q=3, num_bins=5)
    model = WorldModel(WorldModelConfig((5,), 3, **sizes, episodic=True, **tasks)).eval()
    teacher = TDMPC2(model, PlannerConfig(2, 1, 8, 4, 2), task=0 if tasks else None, compute=COMPILED)
    corrector = build_corrector(CorrectorConfig(16, 3, architecture)).eval()
    SpeculativeAgent(teacher, SpeculationConfig(corrector=architecture), corrector).act(np.zeros(5))
    planner, step = ran
    package = str(Path(tdmpc2.__file__).parent)
    for function, paths in ran.items():
        assert {path for path in paths if path.startswith(package)} <= set(function.sources())
    only = [
        {Path(path).name for path in one.sources()} - {Path(path).name for path in other.sources()}
        for one, other in ((planner, step), (step, planner))
    ]
    assert only == [{"planner.py"}, {"agent.py", "corrector.py"}]


def test_others_that_compile_at_the_same_time_see_nothing_of_it(
    libraries: Path, monkeypatch, tmp_path: Path
) -> None:
    common = tmp_path / "common"
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(common))
    with torch.no_grad():
        ahead_of(nn.Linear(3, 2), 2.0)(torch.zeros(1, 3))
    assert not [path for path in common.rglob("*") if path.is_file()]
    assert [path.suffix for path in libraries.iterdir()] == [".pt2"]


def test_without_a_compiler_it_works_all_the_same_and_says_so(capsys) -> None:
    compiled = AheadOfTime(lambda x: x.cos() + 41.375, lambda y: y[0], what="the planner", depends_on="")
    with torch._inductor.config.patch({"cpp.cxx": (None, "/nowhere/c++")}):
        for _ in range(2):
            assert torch.equal(compiled(torch.zeros(3, 2)), torch.full((3, 2), 42.375))
    said = capsys.readouterr().err.splitlines()
    assert sum(line.startswith("the planner stays uncompiled") for line in said) == 1


def test_a_start_does_not_load_the_compiler(tmp_path: Path) -> None:
    """Nor does anything that an agent imports: it is what makes a start slow."""
    script = tmp_path / "start.py"
    script.write_text(
        "import sys, torch, tdmpc2\n"
        "from tdmpc2.inference import AheadOfTime\n"
        "compiled = AheadOfTime(lambda x: x.sin(), lambda y: y[0], what='it', depends_on='')\n"
        "y = compiled(torch.zeros(1)).item()\n"
        "print(y, ['torch.' + name in sys.modules for name in ('_inductor', '_dynamo')])\n"
    )
    first, second = (
        subprocess.run([sys.executable, script], capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    )
    assert first.strip() == "0.0 [True, True]"
    assert second.strip() == "0.0 [False, False]"
