"""The replay buffer: whole episodes in a ring of rows; it samples segments and saves shards.

An episode of T steps has T+1 rows, one for each observation; the last row has no action. Rows are numbered
from the first one ever written, and row `p` is at `p % capacity`. In this example with capacity 10 and
episodes of 3, 2 and 4 steps, the third episode wraps and overwrites the first:

    at        0   1   2   3   4   5   6   7   8   9
    row      10  11   2   3   4   5   6   7   8   9
    holds    c3  c4   -   -  b0  b1  b2  c0  c1  c2

A segment of H steps may start at every row with H later rows in its episode; all are equally likely. The
published sampler never samples an episode shorter than H steps. Here a terminated one is padded to H steps,
so the model also sees early failures. The padding repeats the last observation, has zero actions and
rewards, and is terminated. A short episode that was only cut off is never sampled.

On disk the buffer is a folder of shards, each with the episodes of one `save`.
"""

from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..errors import DataError, FileError
from ..files import read_tensors, write_tensors
from .update import Batch

FORMAT = "tdmpc2-replay-1"
COLUMNS = ("obs", "action", "reward", "terminated")
AGAIN = "start a new run in another folder"


class Episode(NamedTuple):
    """An episode of T steps, all on the CPU."""

    obs: Tensor  # [T+1, *obs_shape], float32, or uint8 pixels
    action: Tensor  # [T, A] float32
    reward: Tensor  # [T] float32
    terminated: Tensor  # [T] float32, 1.0 if the step terminated the episode


class Replay:
    """Ring of episodes; samples segments uniformly.

    Args:
        capacity: rows at most; memory grows as rows are filled.
        horizon: H, steps of a segment.
        seed: of the sampling.
    """

    def __init__(self, capacity: int, horizon: int, seed: int):
        self.capacity, self.horizon = capacity, horizon
        self.generator = torch.Generator().manual_seed(seed)
        self.end = 0  # number of the next row
        self._starts: list[int] = []  # first row of each episode, oldest first
        self._rows: Episode | None = None  # columns of storage, one entry per row
        self._cumulative = torch.zeros(0, dtype=torch.long)  # segments up to and including each episode
        self._offset = torch.zeros(0, dtype=torch.long)  # from a segment's number to its first row

    def __len__(self) -> int:
        """Number of rows."""
        return self.end - self.first

    @property
    def first(self) -> int:
        """Number of the oldest row; `end` if the buffer is empty."""
        return self._starts[0] if self._starts else self.end

    @property
    def num_slices(self) -> int:
        return int(self._cumulative[-1]) if len(self._cumulative) else 0

    def add(self, episode: Episode) -> None:
        """Append an episode, padded if it terminated within H steps; remove the oldest if necessary.

        Raises:
            DataError: the episode is larger than the capacity.
        """
        if episode.terminated[-1] and (short := self.horizon - len(episode.reward)) > 0:
            episode = Episode(
                torch.cat([episode.obs, episode.obs[-1:].expand(short, *episode.obs.shape[1:])]),
                torch.cat([episode.action, episode.action.new_zeros(short, episode.action.shape[1])]),
                torch.cat([episode.reward, episode.reward.new_zeros(short)]),
                torch.cat([episode.terminated, episode.terminated.new_ones(short)]),
            )
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
        """Segments `[H+1, B, ...]` of H steps, each from one episode, on the CPU."""
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
        """The storage, large enough for `rows` rows, at most the capacity."""
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
        """Write the episodes that start at row `since` or later, if any, as one shard.

        It replaces an earlier shard with the same `since`, which had fewer episodes.

        Raises:
            FileError: the shard cannot be written.
        """
        starts = [s for s in self._starts if s >= since]
        if not starts or self._rows is None:
            return
        at = torch.arange(starts[0], self.end) % self.capacity
        columns = {name: column[at] for name, column in zip(COLUMNS, self._rows, strict=True)}
        lengths = torch.from_numpy(np.diff([*starts, self.end]))
        path = folder / f"{starts[0]:012d}.safetensors"
        write_tensors(path, columns | {"lengths": lengths}, {"format": FORMAT})

    def forget(self, folder: Path) -> None:
        """Delete the shards whose episodes are no longer in the buffer.

        Raises:
            FileError: a shard cannot be deleted.
        """
        for (_, path), (next_begin, _) in pairwise(_shards(folder)):
            if next_begin <= self.first:
                _delete(path)

    def load(self, folder: Path, first: int, end: int, like: Episode) -> None:
        """Fill an empty buffer from its shards with rows `first` to `end`.

        Deletes later shards and files of killed processes: no other process may write to the folder.

        Args:
            folder: of the shards.
            first, end: of the buffer when its shards were last saved.
            like: any episode of the environment, of any length.

        Raises:
            DataError: a shard is missing, damaged, or of another environment.
            FileError: a shard cannot be read or deleted.
        """
        for begin, path in _shards(folder):
            if begin >= end:  # written after the checkpoint
                _delete(path)
        for path in folder.glob(".*.tmp"):  # left by a killed process
            _delete(path)
        shards = _shards(folder)
        while len(shards) > 1 and shards[1][0] <= first:
            shards.pop(0)
        self.end = shards[0][0] if shards else 0
        for begin, path in shards:
            # If the buffer is smaller than a shard, a shard may repeat the newest rows of the last one.
            for episode in _read(path, like) if begin == self.end else ():
                if self.end < end:  # the shard may have grown after the checkpoint
                    self.add(episode)
        if (self.first, self.end) != (first, end):
            raise DataError(f"{folder} lacks a shard: rows {first} to {end} are incomplete: {AGAIN}")


def _read(path: Path, like: Episode) -> list[Episode]:
    """The episodes of a shard."""
    tensors, _ = read_tensors(path, FORMAT, AGAIN, DataError)
    try:
        columns = [tensors[name] for name in COLUMNS]
        for name, column, usual in zip(COLUMNS, columns, like, strict=True):
            if column.dtype != usual.dtype or column.shape[1:] != usual.shape[1:]:
                raise DataError(
                    f"{path} has {name} as {column.dtype} {list(column.shape[1:])}, the environment has "
                    f"{usual.dtype} {list(usual.shape[1:])}: {AGAIN}"
                )
        lengths = tensors["lengths"].tolist()
        if min(lengths) < 2:
            raise ValueError("an episode has no step")
        episodes = zip(*(column.split(lengths) for column in columns), strict=True)
        return [Episode(obs, action[:-1], reward[:-1], ended[:-1]) for obs, action, reward, ended in episodes]
    except (KeyError, RuntimeError, TypeError, IndexError, ValueError) as e:
        raise DataError(f"{path} does not contain episodes ({' '.join(str(e).split())}): {AGAIN}") from e


def _shards(folder: Path) -> list[tuple[int, Path]]:
    """The first row's number and the path of every shard, oldest first."""
    return sorted((int(path.stem), path) for path in folder.glob("*.safetensors") if path.stem.isdecimal())


def _delete(path: Path) -> None:
    try:
        path.unlink()
    except OSError as e:
        raise FileError(f"{path} cannot be deleted: {e.strerror or e}") from e
