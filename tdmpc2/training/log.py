"""Where a training run writes what happened: CSV tables, TensorBoard, and W&B where asked for."""

import csv
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from ..errors import ConfigError


class Log:
    """Tables of a run: one CSV file each, every row also a set of curves over `step`.

    Args:
        folder: of the run.
        columns: of each table, by its name; all have a column `step`.
        sizes: bytes of each table to keep, when a run goes on; what was written later is cut off.
        step: from which the run goes on.
        wandb_project: "" for none.
        config: of the run, shown by W&B.

    Raises:
        ConfigError: W&B is asked for and not installed.
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
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
        self._stack = ExitStack()
        self._files, self._writers = {}, {}
        for name, header in columns.items():
            path = folder / f"{name}.csv"
            file = self._stack.enter_context(path.open("a", newline=""))
            file.truncate((sizes or {}).get(name, 0))
            self._files[name] = file
            self._writers[name] = csv.DictWriter(file, header, lineterminator="\n")
            if not sizes:
                self._writers[name].writeheader()

    def write(self, table: str, row: Mapping[str, float]) -> None:
        """Append a row; columns that it leaves out stay empty."""
        self._writers[table].writerow(row)
        self._files[table].flush()
        curves = {f"{table}/{name}": value for name, value in row.items() if name != "step"}
        for name, value in curves.items():
            self._board.add_scalar(name, value, int(row["step"]))
        if self._wandb is not None:
            self._wandb.log(curves, step=int(row["step"]))

    def sync(self) -> dict[str, int]:
        """Make every row safe on the disk; returns the size of each table in bytes."""
        for file in self._files.values():
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


def _start_wandb(project: str, folder: Path, config: dict[str, Any] | None) -> Any:
    try:
        import wandb
    except ImportError as e:
        raise ConfigError("wandb_project is set, but wandb is not: pip install wandb") from e
    run_id = str(folder.resolve()).strip("/").replace("/", "-")[-64:]
    return wandb.init(project=project, dir=str(folder), config=config, id=run_id, resume="allow")
