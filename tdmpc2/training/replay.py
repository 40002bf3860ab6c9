"""The replay buffer: whole episodes in a ring of rows, slices out, shards on disk.

An episode of T steps takes T+1 rows, one for each observation; the last row has no action. Rows
are numbered from the first ever written, and row `p` lies at `p % capacity`. In an example with
capacity 10 and episodes of 3, 2 and 4 steps, the third one wraps and pushes the first one out:

    at        0   1   2   3   4   5   6   7   8   9
    row      10  11   2   3   4   5   6   7   8   9
    holds    c3  c4   -   -  b0  b1  b2  c0  c1  c2

A slice of H steps may start at every row that has H more of its episode after it; all of them are
equally likely. The published sampler never draws an episode of fewer than H steps. Here one that
terminated is padded to H steps, because it would be a failure that the model never hears of: after a
termination nothing counts, so the padding repeats the last observation, has zero actions and rewards,
and is terminated. One that was only cut off is never drawn.

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
AGAIN = "start the run anew elsewhere"


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
        return self.end - self.first

    @property
    def first(self) -> int:
        """Number of the oldest row held; `end` where there is none."""
        return self._starts[0] if self._starts else self.end

    @property
    def num_slices(self) -> int:
        return int(self._cumulative[-1]) if len(self._cumulative) else 0

    def add(self, episode: Episode) -> None:
        """Append an episode, padded where it terminated within H steps; the oldest ones make room.

        Raises:
            DataError: it alone is larger than the capacity.
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
        """Write the episodes that start at row `since` or later, if any, as one shard.

        A shard of the same `since` that was written before, with fewer episodes, is replaced.

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
        """Delete the shards whose episodes were all pushed out.

        Raises:
            FileError: a shard cannot be deleted.
        """
        for (_, path), (next_begin, _) in pairwise(_shards(folder)):
            if next_begin <= self.first:
                _delete(path)

    def load(self, folder: Path, first: int, end: int, like: Episode) -> None:
        """Fill an empty buffer from its shards with rows `first` to `end`; later shards are deleted.

        So is what a killed process left: nobody else may be writing to the folder.

        Args:
            folder: of the shards.
            first, end: of the buffer when its shards were last saved.
            like: any episode of the environment, of any length.

        Raises:
            DataError: a shard is missing, damaged, or of another environment.
            FileError: a shard cannot be read or deleted.
        """
        for begin, path in _shards(folder):
            if begin >= end:  # written after the checkpoint that is gone on from
                _delete(path)
        for path in folder.glob(".*.tmp"):  # of shards that are never written again
            _delete(path)
        shards = _shards(folder)
        while len(shards) > 1 and shards[1][0] <= first:
            shards.pop(0)
        self.end = shards[0][0] if shards else 0
        for begin, path in shards:
            # In a buffer smaller than a shard, a shard may hold the newest rows of the one before again.
            for episode in _read(path, like) if begin == self.end else ():
                if self.end < end:  # the shard may have grown after the checkpoint
                    self.add(episode)
        if (self.first, self.end) != (first, end):
            raise DataError(f"{folder} lacks a shard: rows {first} to {end} are not all there: {AGAIN}")


def _read(path: Path, like: Episode) -> list[Episode]:
    """The episodes of a shard."""
    tensors, _ = read_tensors(path, FORMAT, AGAIN, DataError)
    try:
        columns = [tensors[name] for name in COLUMNS]
        for name, column, usual in zip(COLUMNS, columns, like, strict=True):
            if column.dtype != usual.dtype or column.shape[1:] != usual.shape[1:]:
                raise DataError(
                    f"{path} holds {name} as {column.dtype} {list(column.shape[1:])}, the environment has "
                    f"{usual.dtype} {list(usual.shape[1:])}: {AGAIN}"
                )
        lengths = tensors["lengths"].tolist()
        if min(lengths) < 2:
            raise ValueError("an episode has no step")
        episodes = zip(*(column.split(lengths) for column in columns), strict=True)
        return [Episode(obs, action[:-1], reward[:-1], ended[:-1]) for obs, action, reward, ended in episodes]
    except (KeyError, RuntimeError, TypeError, IndexError, ValueError) as e:
        raise DataError(f"{path} holds no episodes ({' '.join(str(e).split())}): {AGAIN}") from e


def _shards(folder: Path) -> list[tuple[int, Path]]:
    """Number of the first row, and path, of every shard, oldest first."""
    return sorted((int(path.stem), path) for path in folder.glob("*.safetensors") if path.stem.isdecimal())


def _delete(path: Path) -> None:
    try:
        path.unlink()
    except OSError as e:
        raise FileError(f"{path} cannot be deleted: {e.strerror or e}") from e
