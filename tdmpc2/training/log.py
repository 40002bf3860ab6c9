"""Logs of a training run: CSV tables, TensorBoard, and optionally W&B."""

import csv
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from ..errors import ConfigError, DataError, FileError
from ..files import file_name


class Log:
    """Tables of a run: one CSV file per table, and curves over `step`.

    Args:
        folder: of the run.
        columns: of each table, by its name; each table has a column `step`.
        sizes: bytes to keep of each table when a run is resumed; later rows are cut off.
        step: the step at which the run resumes.
        wandb_project: "": no W&B.
        config: of the run, shown by W&B.

    Raises:
        ConfigError: W&B is not installed or does not start.
        DataError: a table has lost rows.
        FileError: the folder cannot be written to.
    """

    def __init__(
        self,
        folder: Path,
        columns: Mapping[str, Sequence[str]],
        *,
        sizes: Mapping[str, int] | None = None,
        step: int = 0,
        wandb_project: str = "",
        config: dict[str, Any] | None = None,
    ):
        self._wandb = _start_wandb(wandb_project, folder, config) if wandb_project else None
        self._files, self._writers = {}, {}
        with _named(folder), ExitStack() as stack:
            for name, header in columns.items():
                file = stack.enter_context((folder / f"{name}.csv").open("a", newline=""))
                size = sizes[name] if sizes else 0
                if os.path.getsize(file.name) < size:
                    raise DataError(f"{file.name} has lost rows: restore it, or start another run elsewhere")
                file.truncate(size)
                self._files[name] = file
                self._writers[name] = csv.DictWriter(file, header, lineterminator="\n")
                if not sizes:
                    self._writers[name].writeheader()
            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
            self._stack = stack.pop_all()

    def write(self, table: str, row: Mapping[str, float]) -> None:
        """Append a row; missing columns stay empty.

        Raises:
            FileError: the row cannot be written.
        """
        with _named(self._files[table].name):
            self._writers[table].writerow(row)
            self._files[table].flush()
        curves = {f"{table}/{name}": value for name, value in row.items() if name != "step"}
        for name, value in curves.items():
            self._board.add_scalar(name, value, int(row["step"]))
        if self._wandb is not None:
            self._wandb.log(curves, step=int(row["step"]))

    def sync(self) -> dict[str, int]:
        """Sync all rows to the disk; returns the size of each table in bytes.

        Raises:
            FileError: the disk is full.
        """
        for file in self._files.values():
            with _named(file.name):
                file.flush()
                os.fsync(file.fileno())
        return {name: os.path.getsize(file.name) for name, file in self._files.items()}

    def __enter__(self) -> "Log":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stack.close()
        self._board.close()
        if self._wandb is not None:
            self._wandb.finish(exit_code=0 if error is None else 1)


@contextmanager
def _named(path: str | Path) -> Iterator[None]:
    try:
        yield
    except OSError as e:
        raise FileError(f"{path} cannot be written: {e.strerror or e}") from e


def _start_wandb(project: str, folder: Path, config: dict[str, Any] | None) -> Any:
    try:
        import wandb
    except ImportError as e:
        raise ConfigError("wandb_project needs wandb: pip install wandb") from e
    run_id = file_name(str(folder.resolve()).strip("/"))[-64:]
    try:
        return wandb.init(project=project, dir=str(folder), config=config, id=run_id, resume="allow")
    except Exception as e:
        reason = " ".join(f"{type(e).__name__}: {e}".split())
        raise ConfigError(f"wandb_project={project}: W&B does not start ({reason})") from e
