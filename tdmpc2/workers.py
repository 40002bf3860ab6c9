"""Units of work in several processes: the episodes of a mode, a shard of data.

Episodes do not depend on each other, so a process for each core, with one thread each, uses a machine better
than one process with many threads. A unit is a function of its arguments that leaves whole files. It always
computes with one thread, because several threads round sums differently. Where it runs makes no difference.
"""

import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar

import gymnasium
import joblib
import torch
from gymnasium.envs.registration import EnvSpec
from joblib.externals.loky.process_executor import TerminatedWorkerError

from .envs import import_module
from .errors import ConfigError
from .inference import threads
from .progress import SILENT, Progress, Stage

Result = TypeVar("Result")
POLL = 0.5  # seconds between two looks at another process


@dataclass(frozen=True)
class Workers:
    """Where units of work run, and who shows how far they are."""

    number: int = 1  # processes with one thread each; 1: this process
    progress: Progress = SILENT

    @classmethod
    def of(cls, number: int, device: str, progress: Progress) -> "Workers":
        """As many processes as the setting `workers=number` asks for.

        Args:
            number: 0: one for each core that this process may use; on a GPU, one.
            device: that the units compute on.
            progress: shows how far they are.

        Raises:
            ConfigError: there are several for one GPU.
        """
        on_cpu = torch.device(device).type == "cpu"
        if number > 1 and not on_cpu:
            raise ConfigError(f"workers={number}: a GPU serves one process, so give workers=1")
        return cls(number or (joblib.cpu_count() if on_cpu else 1), progress)

    def map(
        self,
        name: str,
        function: Callable[..., Result],
        units: Mapping[str, tuple[Any, ...]],
        *,
        task: str,
        total: float | None = None,
    ) -> Iterator[tuple[str, Result]]:
        """Call `function(*arguments, advance)` for every unit; yields name and result of each one that ends.

        Args:
            name: of the stage that is shown.
            function: of a module; it calls `advance(n)` after every `n` steps.
            units: their arguments by name.
            task: a process imports its module; without a module, it gets the registration from here.
            total: steps of all units; None: not known.

        Raises:
            ConfigError: the system killed a process.
        """
        several = min(self.number, len(units)) > 1
        with self.progress.add(name, total, unit="steps") as stage:
            run = _in_processes if several else _in_turn
            for ended, (unit, result) in enumerate(run(self.number, function, units, task, stage), 1):
                stage.note(f"{ended} of {len(units)}")
                yield unit, result
            stage.complete()


def _in_turn(
    number: int, function: Callable[..., Result], units: Mapping[str, tuple], task: str, stage: Stage
) -> Iterator[tuple[str, Result]]:
    for name, arguments in units.items():
        with threads(1):
            result = function(*arguments, stage.advance)
        yield name, result


def _in_processes(
    number: int, function: Callable[..., Result], units: Mapping[str, tuple], task: str, stage: Stage
) -> Iterator[tuple[str, Result]]:
    registered = gymnasium.registry.get(task)
    with tempfile.NamedTemporaryFile(prefix="tdmpc2-steps-") as steps, _followed(steps.name, stage):
        jobs = (
            joblib.delayed(_unit)(function, name, arguments, task, registered, steps.name, os.getpid())
            for name, arguments in units.items()
        )
        processes = joblib.Parallel(
            n_jobs=min(number, len(units)),
            batch_size=1,
            pre_dispatch="n_jobs",  # each unit holds a copy of the teacher
            return_as="generator_unordered",
        )
        try:
            yield from processes(jobs)
        except TerminatedWorkerError as e:
            raise ConfigError(
                f"the system killed one of {number} processes, perhaps for its memory: try workers=1"
            ) from e


def _unit(
    function: Callable[..., Result],
    name: str,
    arguments: tuple[Any, ...],
    task: str,
    registered: EnvSpec | None,
    steps: str,
    parent: int,
) -> tuple[str, Result]:
    """A unit in a process of its own; every byte of the file `steps` is a step that is done."""
    torch.set_num_threads(1)
    _ends_with(parent)
    if ":" in task:
        import_module(task)
    if registered is not None:
        gymnasium.registry.setdefault(registered.id, registered)
    with open(steps, "ab", buffering=0) as file:
        return name, function(*arguments, lambda n: file.write(b"." * int(n)))


@cache
def _ends_with(parent: int) -> None:
    """From now on this process ends when `parent` does, also where that was killed."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(POLL)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


HERE = Workers()


@contextmanager
def _followed(steps: str, stage: Stage) -> Iterator[None]:
    """Meanwhile `stage` shows the size of the file `steps`."""
    over = threading.Event()

    def follow() -> None:
        while not over.wait(POLL):
            stage.at(os.stat(steps).st_size)

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        stage.at(os.stat(steps).st_size)
