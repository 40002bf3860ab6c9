"""Reading and writing files: a file is written whole or not at all, and a damaged file is noticed.

A file of tensors is a safetensors file. Its header has one entry, `tdmpc2`: JSON with the file's kind
(`format`), the writer's own values, and a SHA-256 digest of the header and every tensor.
"""

import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO
from uuid import uuid4

import safetensors.torch
import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from torch import Tensor

from .errors import ConfigError, DataError, FileError, TDMPC2Error

LOCK = ".lock"
ABANDONED = 3600.0  # seconds; an older temporary file was left by a killed process
MAX_JSON = 64 * 2**20  # bytes


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; it replaces `path` if nothing is raised.

    with atomic_write("runs/evaluation.csv") as tmp:
        table.to_csv(tmp)

    A missing folder is made. Each writer has its own temporary file, `.NAME.*.tmp`; a write also deletes old
    ones that killed processes left. The file's mode follows the umask.

    Raises:
        FileError: the file cannot be written: a full disk, no permission, a file in place of a folder.
    """
    path = Path(path)
    tmp = path.with_name(f".{path.name}.{uuid4().hex[:12]}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for other in path.parent.glob(f".{path.name}.*.tmp"):
            with suppress(OSError):
                if time.time() - other.stat().st_mtime > ABANDONED:
                    other.unlink()
        tmp.touch()
        mode = tmp.stat().st_mode  # libraries that write the file may narrow it
        try:
            yield tmp
            with open(tmp, "rb+") as file:
                os.fsync(file.fileno())
            os.chmod(tmp, mode)
            os.replace(tmp, path)
        finally:
            tmp.unlink(missing_ok=True)
    except (OSError, SafetensorError) as e:
        reason = e.strerror if isinstance(e, OSError) and e.strerror else str(e)
        raise FileError(f"{path} cannot be written: {reason}") from e


@contextmanager
def atomic_folder(path: str | Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; it becomes `path` if nothing is raised.

    Args:
        path: does not exist, or is an empty folder.
        replace: `path` may also be a folder with files, which are deleted.

    Raises:
        FileError: the folder cannot be written.
    """
    path = Path(os.path.abspath(path))
    tmp = path.with_name(f".{path.name}.{uuid4().hex[:12]}.tmp")
    try:
        tmp.mkdir(parents=True)
        try:
            yield tmp
            if replace and path.exists():
                shutil.rmtree(path)
            os.replace(tmp, path)
        finally:
            shutil.rmtree(tmp, ignore_errors=True)
    except OSError as e:
        raise FileError(f"{path} cannot be written: {e.strerror or e}") from e


def check_writable(path: str | Path) -> None:
    """Raise FileError if the file cannot be written; call it before long work."""
    there = Path(path).exists()
    try:
        with open(path, "ab"):
            pass
        if not there:
            os.unlink(path)
    except OSError as e:
        raise FileError(f"{path} cannot be written: {e.strerror}") from e


@contextmanager
def in_use(folder: str | Path) -> Iterator[None]:
    """Make `folder` if it is missing, and lock it against other processes.

    Raises:
        ConfigError: another process has locked it.
        FileError: the folder cannot be made or written to.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / LOCK, timeout=0):
            yield
    except Timeout as e:
        raise ConfigError(
            f"{folder} is in use by another process: wait until it ends, or choose another folder"
        ) from e
    except BrokenPipeError:  # from the terminal, not the folder
        raise
    except OSError as e:
        where = e.filename or folder
        raise FileError(f"{where} cannot be written: {e.strerror or e}") from e


def file_name(text: str) -> str:
    """`text` with a dash for every character that file names should not have, such as a colon."""
    return re.sub(r"[^\w.-]", "-", text)


def in_order(paths: Iterable[Path]) -> list[Path]:
    """Paths in numerical order: `round-2` before `round-10`."""
    return sorted(
        paths, key=lambda path: [int(x) if x.isdigit() else x for x in re.split(r"(\d+)", str(path))]
    )


def exists(path: str | Path) -> bool:
    """Whether a file or folder exists.

    Raises:
        FileError: unknown, because a parent folder may not be entered.
    """
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError) as e:
        raise _unreadable(path, e) from e
    return True


def open_file(path: str | Path) -> BinaryIO:
    """Open a file for reading.

    Raises:
        FileError: the file is missing, not a regular file, or may not be read.
    """
    if exists(path) and not os.path.isfile(path):  # reading a pipe would never end
        raise FileError(f"{path} is not a regular file: give another file")
    try:
        return open(path, "rb")
    except OSError as e:
        raise _unreadable(path, e) from e


def read_bytes(path: str | Path) -> bytes:
    """The content of a file; errors as in `open_file`."""
    try:
        with open_file(path) as file:
            return file.read()
    except OSError as e:
        raise _unreadable(path, e) from e


def _unreadable(path: str | Path, error: OSError | ValueError) -> FileError:
    """The FileError for a system error, or for the ValueError of a path with a null character."""
    return FileError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}")


def write_json(path: str | Path, content: Any) -> None:
    text = json.dumps(content, indent=2) + "\n"
    with atomic_write(path) as tmp:
        tmp.write_text(text, encoding="utf-8")


def read_json(path: str | Path) -> Any:
    """The content of a JSON file.

    Raises:
        FileError: the file is missing or may not be read.
        DataError: the file is damaged.
    """
    raw = read_bytes(path)
    try:
        if len(raw) > MAX_JSON:
            raise ValueError(f"{len(raw):,} bytes are too many")
        return json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError) as e:  # not JSON, or not text
        reason = "nested too deeply" if isinstance(e, RecursionError) else e
        raise DataError(f"{path} is damaged ({reason}): restore it, or delete it and run again") from e


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings by the names that users type: `{"planner": {"horizon": 3}}` gives `{"planner.horizon": 3}`."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return found


def difference(earlier: Any, now: Mapping[str, Any], free: Collection[str] = ()) -> str:
    """The first setting in which two JSON objects differ, in words; "" if they agree.

    Args:
        earlier: from a file.
        now: compared with it.
        free: settings that may differ, named as in `flat`.
    """
    if not isinstance(earlier, dict):
        return "no settings at all"
    before, after = flat(earlier), flat(json.loads(json.dumps(now)))
    for name in sorted((before.keys() | after.keys()) - {*free}):
        if name not in after:
            return f"{name}={json.dumps(before[name])}, which is no longer a setting"
        if before.get(name) != after[name]:
            return f"{name}={json.dumps(before.get(name))}, not {json.dumps(after[name])}"
    return ""


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """Write a file of tensors, whole or not at all.

    Args:
        path: the file.
        tensors: any dtypes and devices.
        about: JSON values for the header, with `format`.

    Raises:
        FileError: the file cannot be written.
    """
    header = json.loads(json.dumps(about))  # JSON turns keys into strings
    own = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    header["digest"] = _digest(own, header)
    with atomic_write(path) as tmp:
        # A single entry: safetensors orders several entries at random, and equal data must give equal files.
        safetensors.torch.save_file(own, tmp, metadata={"tdmpc2": json.dumps(header)})


def read_tensors(
    path: str | Path, kind: str, again: str, error: type[TDMPC2Error], *, bare: bool = False
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and header of a file that `write_tensors` wrote.

    Args:
        path: the file.
        kind: the expected `format` of its header.
        again: advice for the user if the file is useless.
        error: raised if the file is damaged or has another format.
        bare: also read files without our header, unchecked; the header is then empty.

    Raises:
        FileError: the file is missing or may not be read.
    """
    raw = read_bytes(path)
    about = _header(raw, path, kind, again, error, bare)
    try:
        tensors = safetensors.torch.load(raw)
        changed = bool(about) and about.pop("digest", None) != _digest(tensors, about)
    except (SafetensorError, ValueError, LookupError, TypeError, RuntimeError, AttributeError) as e:
        raise error(f"{path} is damaged ({' '.join(str(e).split()):.120}): {again}") from e
    if changed:
        raise error(f"{path} is damaged, its contents have changed: {again}")
    return tensors, about


def _header(
    raw: bytes, path: str | Path, kind: str, again: str, error: type[TDMPC2Error], bare: bool = False
) -> dict[str, Any]:
    try:
        header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
        if bare and "__metadata__" not in header:
            return {}
        about = json.loads(header["__metadata__"]["tdmpc2"])
        found = about["format"]
    except (ValueError, KeyError, TypeError, RecursionError, OverflowError) as e:
        raise error(f"{path} is damaged or something else: {again}") from e
    if found != kind:
        raise error(f"{path} has format {found!r}, not {kind!r}: {again}")
    return about


def _digest(tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> str:
    """SHA-256 of tensors and header, independent of their order."""
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        # As bytes, because NumPy lacks some dtypes.
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
