"""Units of work: the same results in this process and in others, and what ends them."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from io import StringIO
from pathlib import Path

import gymnasium as gym
import pytest
import torch
from rich.console import Console
from stand_ins import ENVIRONMENT

from tdmpc2.config import BudgetOverride
from tdmpc2.distillation import collect
from tdmpc2.envs import import_module
from tdmpc2.errors import ConfigError
from tdmpc2.progress import SILENT, Progress
from tdmpc2.teacher import open_teacher
from tdmpc2.workers import Workers

TEACHER = Path(__file__).parent / "fixtures/official/state_small.pt"
SMALL_BUDGET = BudgetOverride(num_samples=8, iterations=1, num_elites=4, num_pi_trajs=4, compile=False)


def count(name: str, until: int, parent: int, advance: Callable[[float], None]) -> str:
    for _ in range(until):
        advance(1)
    where = "this one" if os.getpid() == parent else "another process"
    return f"{name} in {where}, {torch.get_num_threads()} thread"


def fail(kind: str, advance: Callable[[float], None]) -> None:
    if kind == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    raise ConfigError("no such thing")


@pytest.fixture
def two_threads() -> Iterator[None]:
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


@pytest.mark.parametrize("number", [1, 2])
def test_every_unit_is_done_and_its_steps_are_counted(number: int, two_threads: None) -> None:
    units = {name: (name, steps, os.getpid()) for name, steps in (("a", 3), ("b", 4), ("c", 5))}
    shown = Console(file=StringIO(), width=200)
    with Progress(shown) as progress:
        done = dict(Workers(number, progress).map("counting", count, units, task="walker-walk"))
    where = "this one" if number == 1 else "another process"
    assert done == {name: f"{name} in {where}, 1 thread" for name in units}
    assert torch.get_num_threads() == 2, "only units are restricted"
    assert "counting: 12 of 12 steps, 3 of 3" in shown.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("kind", "message"), [("refused", "no such thing"), ("killed", "killed one of 2 processes.*workers=1")]
)
def test_what_a_unit_raises_is_raised_here(kind: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        list(Workers(2).map("failing", fail, {"a": (kind,), "b": (kind,)}, task="walker-walk"))


@pytest.fixture
def short_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A task of a module in the current folder, which a process has to import."""
    register = 'gym.register("Workers-v0", entry_point=Short, max_episode_steps=8)'
    (tmp_path / "workers_task.py").write_text(f"FAIL_AT = 0\n{ENVIRONMENT}\n{register}\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    import_module("workers_task:Workers-v0")
    return "workers_task:Workers-v0"


def test_shards_are_the_same_wherever_they_are_collected(
    short_task: str, tmp_path: Path, two_threads: None
) -> None:
    teacher = open_teacher(short_task, str(TEACHER), SMALL_BUDGET)
    for number in (1, 2):
        collect(teacher, tmp_path / str(number), episodes=2, num_envs=1, workers=Workers(number))
    here, elsewhere = (sorted((tmp_path / n).glob("shard-*")) for n in "12")
    assert [p.read_bytes() for p in here] == [p.read_bytes() for p in elsewhere] and len(here) == 2


def test_a_task_that_was_registered_here_is_known_elsewhere(short_task: str, tmp_path: Path) -> None:
    entry_point = sys.modules[short_task.partition(":")[0]].Short
    gym.register("OnlyHere-v0", entry_point=entry_point, max_episode_steps=8)
    teacher = open_teacher("OnlyHere-v0", str(TEACHER), SMALL_BUDGET)
    assert len(collect(teacher, tmp_path / "data", episodes=2, num_envs=1, workers=Workers(2))) == 2


def test_a_gpu_serves_one_process() -> None:
    assert Workers.of(0, "cuda", SILENT).number == 1 and Workers.of(0, "cpu", SILENT).number >= 1
    with pytest.raises(ConfigError, match="workers=2"):
        Workers.of(2, "cuda", SILENT)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_processes_end_with_the_one_that_started_them(how: int, short_task: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tdmpc2", "collect", f"task={short_task}", f"checkpoint={TEACHER}"]
    command += ["out=.", "workers=2", "planner.num_samples=8", "planner.compile=false"]
    command += ["planner.num_elites=4", "planner.num_pi_trajs=4", "episodes=100000"]
    said = tmp_path / "stderr"
    with said.open("w") as err, subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=err) as started:
        while not (children := workers_of(started.pid)) or not list(tmp_path.glob("shard-*")):
            assert started.poll() is None, said.read_text()
            time.sleep(0.1)
        started.send_signal(how)
        try:
            started.wait(60)
        finally:
            started.kill()
    assert "Traceback" not in said.read_text()
    deadline = time.monotonic() + 20
    while left := [pid for pid in children if Path(f"/proc/{pid}/stat").exists()]:
        if time.monotonic() > deadline:
            for pid in left:
                os.kill(int(pid), signal.SIGKILL)
            pytest.fail("a process outlives the one that it works for")
        time.sleep(0.1)


def workers_of(pid: int) -> list[str]:
    """The processes that compute for it."""
    children = Path(f"/proc/{pid}/task/{pid}/children")
    pids = children.read_text().split() if children.exists() else []
    return [p for p in pids if "LokyProcess" in Path(f"/proc/{p}/cmdline").read_text()]
