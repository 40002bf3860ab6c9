"""Planning in a process of its own.

A thread would share Python's interpreter lock and PyTorch's compute threads with the agent that acts. A
process shares neither. It ends with the process that started it, also if that is killed.
"""

import mmap
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

import cloudpickle
import joblib
import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from ..agent import SpeculativeAgent
from ..inference.compiled import say
from .plans import Answer, LaterPlanner, Request

PATIENCE = 10.0  # seconds without an answer, at least, after which a process counts as stuck
SLOWER = 20.0  # times the first plan's time, likewise
START = 600.0  # seconds after which one that starts, and may compile, counts as stuck
NICE = 5  # of the process that plans: acting goes first where both are on one core
POLL = 0.05  # seconds between two looks while waiting
STARTS = 3  # in a row that may fail
RETRY = 10.0  # seconds until the next try where the system could start no process
GRACE = 0.005  # seconds to wait for the exit status of a process that has closed its connection


class PlannerProcess:
    """Plans in another process.

    A process that dies or is stuck is replaced, and its request is lost; one line on stderr says so.

    Args:
        make: makes the agent that plans; called in the other process.
    """

    def __init__(self, make: Callable[[], SpeculativeAgent]):
        # A file without a name: nobody else can read or change what the process executes.
        self._work = tempfile.TemporaryFile(prefix="tdmpc2-planner-")  # noqa: SIM115
        cloudpickle.dump(make, self._work)
        self._work.flush()
        self._failed = 0  # starts in a row
        self._next_try = 0.0  # time of the next start, if the system could not start a process
        self._is_over = False  # no process starts any more
        self._start()

    @property
    def pid(self) -> int:
        """Of the process that plans."""
        return self._process.pid

    def is_free(self) -> bool:
        return self._is_ready and not self._is_busy

    def is_planning(self) -> bool:
        try:
            return self._is_busy and not self._connection.poll()
        except OSError:
            return False

    def ask(self, request: Request) -> None:
        self._is_busy, self._since = True, time.monotonic()
        try:
            self._connection.send(tree_map(_to_numpy, request))
        except OSError:
            self._replace()

    def answers(self, *, wait: bool = False) -> list[Answer]:
        made: list[Answer] = []
        if self._owner != os.getpid() and not self._is_over:  # in a fork, which has no process of its own yet
            self._end()
            self._try_to_start()
        while not self._is_over:
            if self._next_try:
                if time.monotonic() > self._next_try:
                    self._try_to_start()
                elif wait:
                    time.sleep(POLL)
                else:
                    break
                continue
            try:
                while self._connection.poll(POLL if wait and not self.is_free() else 0):
                    self._read(self._connection.recv(), made)
            except (EOFError, OSError):
                self._replace()
            if not self.is_free() and time.monotonic() - self._since > self._patience:
                self._replace(stuck=True)
            if not wait or self.is_free():
                break
        return made

    def close(self) -> None:
        self._is_over, self._is_ready = True, False
        self._end()

    def _read(self, message: Any, made: list[Answer]) -> None:
        if isinstance(message, Answer):
            made.append(tree_map(_to_torch, message))
            self._is_busy = False
        else:  # seconds that the first plan took
            self._is_ready, self._failed = True, 0
            self._patience = max(PATIENCE, SLOWER * message)

    def _start(self) -> None:
        self._owner, self._is_ready, self._is_busy = os.getpid(), False, False
        self._since, self._patience = time.monotonic(), START
        self._connection, other = multiprocessing.Pipe()
        passed = other.fileno(), self._work.fileno()
        with other:
            self._process = subprocess.Popen(
                # -P: no module is imported from the working directory just because it lies there.
                [sys.executable, "-P", "-c", f"from {__name__} import serve; serve{(*passed, self._owner)}"],
                pass_fds=passed,
                process_group=0,  # Ctrl-C is for this process
                stdin=subprocess.DEVNULL,
                env={
                    **os.environ,
                    "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
                    "OMP_WAIT_POLICY": "PASSIVE",  # threads that wait do not spin
                },
            )
        self._end = weakref.finalize(self, _end, self._owner, self._connection, self._process)

    def _replace(self, *, stuck: bool = False) -> None:
        """Start another process in place of one that has ended or is stuck."""
        if stuck:
            how = "does not answer"
        else:
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(GRACE)
            how = f"has ended{_in_words(self._process.poll())}"
        self._end.detach()
        self._connection.close()
        self._process.kill()
        threading.Thread(target=self._process.wait, daemon=True).start()  # the agent does not wait
        if self._is_ready:
            self._failed = 0
        elif self._has_failed(f"{how} at each start"):
            return
        self._is_ready = self._is_busy = False
        say(f"the planner's process {how}: another one starts, until then no plan is made")
        self._try_to_start()

    def _try_to_start(self) -> None:
        """Start a process; try again later if the system is short of processes."""
        self._next_try = 0.0
        try:
            self._start()
        except OSError as e:
            if not self._has_failed(f"cannot start ({e.strerror})"):
                say(f"the planner's process cannot start ({e.strerror}): the next try is in {RETRY:g} s")
                self._next_try = time.monotonic() + RETRY

    def _has_failed(self, how: str) -> bool:
        """Count a start that failed; True: it was the last one."""
        self._failed += 1
        if self._failed == STARTS:
            self._is_over = True
            say(f"the planner's process {how}: no plan is made any more")
        return self._is_over


def serve(connection: int, work: int, parent: int) -> None:
    """Plan as long as the process `parent` is there.

    Args:
        connection: file descriptor of the connection to it.
        work: file descriptor of what `PlannerProcess` wrote.
        parent: its process id.
    """
    one_less = max(joblib.cpu_count() - 1, 1)  # one core is for acting
    torch.set_num_threads(min(one_less, torch.get_num_threads()))  # fewer if OMP_NUM_THREADS says so
    os.nice(NICE)
    # Not read as a file: processes that forks start share one position in it.
    planner = LaterPlanner(pickle.loads(mmap.mmap(work, 0, access=mmap.ACCESS_READ))())
    planner.warm_up()
    start = time.monotonic()
    planner.warm_up()
    # Not closed here: if planning fails, the error is printed before the parent finds this process gone.
    other = Connection(connection)
    try:
        other.send(time.monotonic() - start)
        while True:
            while not other.poll(1.0):
                if os.getppid() != parent:  # a fork of it may still hold the connection
                    return
            request = tree_map(_to_torch, other.recv())
            other.send(tree_map(_to_numpy, planner(request)))
    except (EOFError, OSError):
        return


def _end(owner: int, connection: Connection, process: "subprocess.Popen[bytes]") -> None:
    """End a process that plans, if this process started it."""
    connection.close()
    if os.getpid() == owner:
        process.kill()
        process.wait()


def _in_words(code: int | None) -> str:
    if code is None:
        return ""
    return f" (exit status {code})" if code >= 0 else f" ({signal.Signals(-code).name})"


def _to_numpy(x: Any) -> Any:
    return x.numpy() if isinstance(x, Tensor) else x


def _to_torch(x: Any) -> Any:
    return torch.from_numpy(x) if isinstance(x, np.ndarray) else x
