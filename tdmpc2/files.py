"""The one place where files are written: whole or not at all."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from .errors import CheckpointError, DataError


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`, which takes its place if nothing is raised.

    with atomic_write("runs/model.safetensors") as tmp:
        save_file(tensors, tmp)

    The folder is made if need be. What a killed process leaves, `NAME.tmp`, the next write replaces.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_name(f"{path.name}.tmp")
    try:
        yield tmp
        with open(tmp, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(tmp, path)
    finally:
        tmp.unlink(missing_ok=True)


def write_json(path: str | Path, content: Any) -> None:
    text = json.dumps(content, indent=2) + "\n"
    with atomic_write(path) as tmp:
        tmp.write_text(text, encoding="utf-8")


def read_json(path: str | Path) -> Any:
    """The content of a JSON file.

    Raises:
        DataError: there is no such file, or it is damaged.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as e:
        raise DataError(f"{path} cannot be read: {e.strerror or e}") from e
    except ValueError as e:  # not JSON, or not even text
        raise DataError(f"{path} is damaged ({e}): restore it, or delete it and run again") from e


def read_metadata(path: str | Path, key: str, version: str, again: str) -> dict[str, Any]:
    """The JSON that a safetensors file of ours has in its header.

    Args:
        path: the file.
        key: under which it stands.
        version: what its entry `format` has to be.
        again: what the user can do where the file is of no use.

    Raises:
        CheckpointError: the file is damaged, or of another format.
    """
    try:
        with safe_open(path, "pt") as file:
            content = json.loads((file.metadata() or {})[key])
        found = content["format"]
    except (SafetensorError, OSError, TypeError, KeyError, ValueError) as e:
        raise CheckpointError(f"{path} is damaged or something else: {again}") from e
    if found != version:
        raise CheckpointError(f"{path} has format {found!r}, expected is {version!r}: {again}")
    return content
