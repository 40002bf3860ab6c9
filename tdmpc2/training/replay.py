"""The replay buffer: whole episodes in a ring of rows, slices out, shards on disk.

An episode of T steps takes T+1 rows, one for each observation; the last row has no action. Rows
are numbered from the first ever written, and row `p` lies at `p % capacity`. In an example with
capacity 10 and episodes of 3, 2 and 4 steps, the third one wraps and pushes the first one out:

    at        0   1   2   3   4   5   6   7   8   9
    row      10  11   2   3   4   5   6   7   8   9
    holds    c3  c4   -   -  b0  b1  b2  c0  c1  c2

A slice of H steps may start at every row that has H more of its episode after it; all of them are
equally likely. On disk the buffer is a folder of shards, each with the episodes of one `save`.
"""

from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import DataError
from ..files import atomic_write
from .update import Batch

COLUMNS = ("obs", "action", "reward", "terminated")


class Episode(NamedTuple):
    """An episode of T steps, all on the CPU."""

    obs: Tensor  # [T+1, *obs_shape], float32, or uint8 pixels
    action: Tensor  # [T, A] float32
    reward: Tensor  # [T] float32
    terminated: Tensor  # [T] float32, 1.0 where the step ended the task itself


class Replay:
    """Ring of episodes, uniform slices.

    Args:
        capacity: rows at most; memory grows to that as they are filled.
        horizon: H, steps of a slice.
        seed: of the sampling.
    """

    def __init__(self, capacity: int, horizon: int, seed: int):
        self.capacity, self.horizon = capacity, horizon
        self.generator = torch.Generator().manual_seed(seed)
        self.end = 0  # number of the next row
        self._starts: list[int] = []  # first row of each episode, oldest first
        self._rows: Episode | None = None  # columns of storage, one entry a row
        self._cumulative = torch.zeros(0, dtype=torch.long)  # slices up to and with each episode
        self._offset = torch.zeros(0, dtype=torch.long)  # from a slice's number to its first row

    def __len__(self) -> int:
        """Rows held."""
        return self.end - self._starts[0] if self._starts else 0

    @property
    def num_slices(self) -> int:
        return int(self._cumulative[-1]) if len(self._cumulative) else 0

    def add(self, episode: Episode) -> None:
        """Append an episode; the oldest ones make room.

        Raises:
            DataError: it alone is larger than the capacity.
        """
        length = len(episode.obs)
        if length > self.capacity:
            raise DataError(
                f"an episode of {length} observations does not fit into buffer_size={self.capacity}"
            )
        rows = self._grown(episode, self.end + length)
        at = torch.arange(self.end, self.end + length) % self.capacity
        rows.obs[at] = episode.obs
        for column, values in zip(rows[1:], episode[1:], strict=True):
            column[at[:-1]] = values
        self._starts.append(self.end)
        self.end += length
        while self.end - self._starts[0] > self.capacity:
            self._starts.pop(0)
        starts = torch.tensor([*self._starts, self.end])
        slices = (starts.diff() - self.horizon).clamp(min=0)
        self._cumulative = slices.cumsum(0)
        self._offset = starts[:-1] - (self._cumulative - slices)

    def sample(self, batch_size: int) -> Batch:
        """Slices `[H+1, B, ...]` of H steps, each within one episode, on the CPU."""
        assert self._rows is not None and self.num_slices, "no episode is long enough yet"
        pick = torch.randint(self.num_slices, (batch_size,), generator=self.generator)
        episode = torch.searchsorted(self._cumulative, pick, right=True)
        first = pick + self._offset[episode]
        row = first + torch.arange(self.horizon + 1)[:, None]  # [H+1, B]
        at = row % self.capacity

        def take(column: Tensor, index: Tensor) -> Tensor:
            return column.index_select(0, index.flatten()).view(*index.shape, *column.shape[1:])

        r, steps = self._rows, at[:-1]
        return Batch(take(r.obs, at), take(r.action, steps), take(r.reward, steps), take(r.terminated, steps))

    def _grown(self, like: Episode, rows: int) -> Episode:
        """The storage, large enough for `rows` rows or for the capacity."""
        have = 0 if self._rows is None else len(self._rows.obs)
        need = min(rows, self.capacity)
        if self._rows is None or need > have:
            size = min(max(need, 2 * have, 4096), self.capacity)
            columns = []
            for i, column in enumerate(like):
                new = column.new_zeros(size, *column.shape[1:])
                if self._rows is not None:
                    new[:have] = self._rows[i]
                columns.append(new)
            self._rows = Episode(*columns)
        return self._rows

    def save(self, folder: Path, since: int) -> None:
        """Write the episodes that start at row `since` or later, if any, as one new shard."""
        starts = [s for s in self._starts if s >= since]
        if not starts or self._rows is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        at = torch.arange(starts[0], self.end) % self.capacity
        columns = {name: column[at] for name, column in zip(COLUMNS, self._rows, strict=True)}
        lengths = np.diff([*starts, self.end])
        with atomic_write(folder / f"{starts[0]:012d}.safetensors") as tmp:
            save_file(columns | {"lengths": torch.from_numpy(lengths)}, tmp)

    def forget(self, folder: Path) -> None:
        """Delete the shards of which every episode was pushed out."""
        shards = _shards(folder)
        for (_, path), (next_first, _) in pairwise(shards):
            if self._starts and next_first <= self._starts[0]:
                path.unlink()

    def load(self, folder: Path, end: int) -> None:
        """Fill an empty buffer from its shards as it was at row `end`; later shards are deleted.

        Raises:
            DataError: a shard is missing or damaged.
        """
        for first, path in _shards(folder):
            if first >= end:  # written after the checkpoint that is gone on from
                path.unlink()
                continue
            try:
                with safe_open(path, "pt") as shard:
                    lengths = shard.get_tensor("lengths").tolist()
                    columns = [shard.get_tensor(name).split(lengths) for name in COLUMNS]
            except (SafetensorError, OSError, RuntimeError) as e:
                raise DataError(f"{path} is damaged ({e}): start the run anew elsewhere") from e
            if self._starts and self.end != first:
                break
            self.end = first
            for obs, action, reward, terminated in zip(*columns, strict=True):
                self.add(Episode(obs, action[:-1], reward[:-1], terminated[:-1]))
        if self.end != end:
            raise DataError(f"{folder} lacks rows from {self.end} on: start the run anew elsewhere")


def _shards(folder: Path) -> list[tuple[int, Path]]:
    """Number of the first row, and path, of every shard, oldest first."""
    return sorted((int(path.stem), path) for path in folder.glob("*.safetensors"))
