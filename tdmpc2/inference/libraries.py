"""The cache of compiled libraries.

A library is machine code: anyone who can write to the cache can run code as its user. So libraries are kept
in `$XDG_CACHE_HOME/tdmpc2`, or `~/.cache/tdmpc2`, only if the folder and the files belong to this user and
only the superuser can write to them or move them too. Otherwise a library lasts as long as the process. A
file `NAME.pt2` is a shared library followed by its SHA-256 digest. A file with a wrong digest is not opened:
the linker would crash.

Making a library deletes all libraries that were not loaded for a month.
"""

import hashlib
import os
import shlex
import shutil
import stat
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TypeAlias

import torch
from filelock import FileLock
from torch import Tensor

from .compiled import say

Run: TypeAlias = Callable[[list[Tensor]], list[Tensor]]

KEPT = 30 * 24 * 3600.0  # seconds that an unused library is kept
ABANDONED = 24 * 3600.0  # seconds; an older compiling folder was left by a killed process
COMPILING = "tdmpc2-compiling-"  # prefix of folders for compiling
DIGEST = hashlib.sha256().digest_size

TEMPORARY = (lambda: Path(tempfile.gettempdir()), lambda: Path("/tmp"))  # used if the cache is not safe

_opened: dict[str, Run] = {}  # by name: all agents of a process share a library
_one_by_one = threading.RLock()


def library(name: str, make: Callable[[Path], Path]) -> Run:
    """The library of that name, opened.

    Args:
        name: a hash of everything that the library depends on.
        make: compiles the library in a folder and returns its path; called if the cache has none.
    """
    with _one_by_one:
        if name not in _opened:
            _opened[name] = _kept(name) or _made_once(name, make)
        return _opened[name]


def cache_folder() -> Path:
    """The folder of libraries, made if it is missing.

    Raises:
        OSError: the folder cannot be made, or other users could write to it.
    """
    try:
        base = Path(os.environ.get("XDG_CACHE_HOME", ""))
        if not base.is_absolute():  # the standard says: ignore it
            base = Path.home() / ".cache"
        folder = base.resolve() / "tdmpc2"
    except RuntimeError as e:  # no home, or links in a circle
        raise OSError(str(e)) from e
    for path in [*reversed(folder.parents), folder]:
        path.mkdir(mode=0o700, exist_ok=True)
        _check(path, ours=path == folder)
    return folder


def _check(folder: Path, ours: bool) -> None:
    """Raise OSError if another user could move this user's files in `folder`.

    If the folder must be `ours`, also if another user could write to it.
    """
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode):
        raise OSError(f"{folder} is a link, or not a folder")
    if status.st_uid != os.geteuid() and (ours or status.st_uid != 0):
        raise OSError(f"{folder} belongs to another user")
    if _others_write(status) and (ours or not status.st_mode & stat.S_ISVTX):  # not as in /tmp
        raise OSError(f"others can write to {folder}: run chmod go-w on it")


def _others_write(status: os.stat_result) -> bool:
    return bool(status.st_mode & (stat.S_IWGRP | stat.S_IWOTH))


def _kept(name: str) -> Run | None:
    """The library from the cache; None if there is none that is safe to open."""
    try:
        path = cache_folder() / f"{name}.pt2"
        with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid() or _others_write(status):
                return None
            content = file.read()
    except OSError:
        return None
    if hashlib.sha256(content[:-DIGEST]).digest() != content[-DIGEST:]:
        return None  # damaged; a new one will replace it
    with suppress(OSError):
        os.utime(path)
    return _open(path)


def _made_once(name: str, make: Callable[[Path], Path]) -> Run:
    """The library; of several processes that want it at the same time, one makes it."""
    with ExitStack() as stack:
        with suppress(OSError):  # without a cache, each makes its own
            lock = cache_folder() / f"{name}.lock"
            stack.enter_context(FileLock(lock))
            stack.callback(lock.unlink, missing_ok=True)
        return _kept(name) or _made(name, make)


def _made(name: str, make: Callable[[Path], Path]) -> Run:
    """Make the library, and keep it if possible."""
    with _temporary(cache_folder, *TEMPORARY) as own:
        path = make(own)
        try:
            path = _keep(name, path.read_bytes())
        except OSError as e:
            say(f"compiled code is not kept, so the next start compiles again: {e}")
        return _open(path)


def _keep(name: str, content: bytes) -> Path:
    """Write a library to the cache; returns its path."""
    folder = cache_folder()
    _clean(folder, "*")
    file, tmp = tempfile.mkstemp(dir=folder)
    try:
        with open(file, "wb") as f:
            f.write(content + hashlib.sha256(content).digest())
            f.flush()
            os.fsync(f.fileno())
        os.replace(tmp, folder / f"{name}.pt2")
    except BaseException:
        os.unlink(tmp)
        raise
    return folder / f"{name}.pt2"


def _open(path: Path) -> Run:
    # Not with `torch._inductor`, which loads the compiler.
    opener = torch._C._aoti.AOTIModelContainerRunnerCpu
    try:
        run: Run = opener(str(path), 1).run
    except RuntimeError:  # the file system may forbid running code
        with _temporary(*TEMPORARY) as own:
            run = opener(str(shutil.copyfile(path, own / path.name)), 1).run
    return run


@contextmanager
def _temporary(*places: Callable[[], Path]) -> Iterator[Path]:
    """A private folder in the first usable one of `places`; deleted afterwards."""
    reason = ""
    for place in places:
        try:
            parent = place().resolve()
            if shlex.quote(str(parent)) != str(parent):  # the compiler gets paths without quotes
                raise OSError(f"the compiler cannot work in {parent}: its name has special characters")
            for path in [parent, *parent.parents]:
                _check(path, ours=False)
            _clean(parent, f"{COMPILING}*")
            own = tempfile.TemporaryDirectory(prefix=COMPILING, dir=parent, ignore_cleanup_errors=True)
        except OSError as e:
            reason = str(e)
            continue
        with own as name:
            yield Path(name)
        return
    raise OSError(reason)


def _clean(folder: Path, pattern: str) -> None:
    """Delete unused libraries, and files that killed processes left."""
    for path in folder.glob(pattern):
        with suppress(OSError):  # another process was faster
            status = path.lstat()
            age = time.time() - status.st_mtime
            if status.st_uid != os.geteuid():
                continue
            if stat.S_ISDIR(status.st_mode) and age > ABANDONED:
                shutil.rmtree(path, ignore_errors=True)
            elif age > (KEPT if path.suffix == ".pt2" else ABANDONED):
                path.unlink()
