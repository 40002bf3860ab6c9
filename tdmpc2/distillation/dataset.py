"""Corrector data: shards of whole episodes on disk, and one `Recording` of them all in memory.

A shard is a safetensors file. Its steps stand one after another, episode after episode:

    step            0    1    2  ...  499  500  501 ...
    episode_end     0    0    0         1    0    0           1: cut off, 2: terminated
    plan            the mean of the plan that the teacher made *from that very step*, at every step; its
                    first action is the teacher's answer there
    drawn           the action that TD-MPC2 would have executed there
    action          what was executed, by whatever behaviour drove the episode

Because every state carries its own plan and its own label, any stretch of any length may be cut
out when the data is read (see `losses.py`), whoever drove. The header names task, teacher, budget,
seeds, behaviours and bursts, and holds a checksum of the tensors.
"""

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import DataError
from ..files import atomic_write

SCHEMA = "tdmpc2-corrector-data-2"
TENSORS = {
    "obs": "[T, *obs_shape]",
    "latent": "[T, L]",
    "plan": "[T, H, A]",
    "drawn": "[T, A]",
    "action": "[T, A]",
    "reward": "[T]",
    "episode_end": "[T] uint8",
}
# Entries in which shards may differ and still be read together.
VARYING = ("seeds", "behaviours", "bursts", "checksum")


class Recording(NamedTuple):
    """Steps of whole episodes, one after another."""

    latent: Tensor  # [N, L]
    plan: Tensor  # [N, H, A]
    drawn: Tensor  # [N, A]
    teacher_action: Tensor  # [N, A]
    first: Tensor  # [N] long, index of the first step of the step's episode
    last: Tensor  # [N] long, index of its last step
    seed: Tensor  # [N] long, seed of the step's episode
    teacher: str  # fingerprint of the world model
    task: Tensor | None = None  # [] long, index of the task of a multi-task model

    def to(self, device: str | torch.device) -> "Recording":
        moved = [x.to(device) if isinstance(x, Tensor) else x for x in self]
        return Recording(*moved)  # type: ignore[arg-type]


def write_shard(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    """Write a shard, whole or not at all; `tensors` are those of `TENSORS`, `header` is JSON."""
    contiguous = {name: tensors[name].cpu().contiguous() for name in TENSORS}
    content = json.dumps({**header, "checksum": _checksum(contiguous)})
    with atomic_write(path) as tmp:
        # One entry, for safetensors writes several in an order of its own: equal data, equal files.
        save_file(contiguous, tmp, metadata={SCHEMA: content})


def read_shard(path: Path, teacher: str | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and header of a shard.

    Args:
        path: the file.
        teacher: fingerprint of the world model that it must belong to; None takes any.

    Raises:
        DataError: the shard is damaged, of another schema, or of another teacher.
    """
    again = "delete it and collect it again"
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        header = json.loads(metadata.get(SCHEMA, "null"))
    except (SafetensorError, OSError, ValueError) as e:
        raise DataError(f"{path} is damaged or no shard: {again}") from e
    if header is None:
        raise DataError(f"{path} is not of schema {SCHEMA}: collect it again with this version")
    if tensors.keys() != TENSORS.keys() or header.get("checksum") != _checksum(tensors):
        raise DataError(f"{path} is damaged, its contents have changed: {again}")
    if teacher is not None and header["teacher"] != teacher:
        raise DataError(
            f"{path} belongs to teacher {header['teacher']}, this one is {teacher}: collect data of its own"
        )
    return tensors, header


def load_shards(folder: str | Path, teacher: str) -> Recording:
    """All shards of a folder and of the folders within, in the order of their paths.

    Args:
        folder: of `shard-*.safetensors`.
        teacher: fingerprint of the world model that they must belong to.

    Raises:
        DataError: there is none, one is damaged or belongs to another teacher, they were not all
            labelled by the same planner on the same task, or two hold an episode of the same seed.
    """
    paths = sorted(Path(folder).rglob("shard-*.safetensors"))
    if not paths:
        raise DataError(f"no shards in {folder}: make some with scripts/collect_corrector_data.py")
    shards, common, seeds = [], None, torch.zeros(0, dtype=torch.long)
    for path in paths:
        tensors, header = read_shard(path, teacher)
        shared = {name: value for name, value in header.items() if name not in VARYING}
        common = common or shared
        for name in common.keys() | shared.keys():
            if common.get(name) != shared.get(name):
                raise DataError(
                    f"{path} has {name} {shared.get(name)} but {paths[0]} has {common.get(name)}: "
                    "collect them into folders of their own"
                )
        own = torch.tensor(header["seeds"])
        if torch.isin(own, seeds).any():
            raise DataError(
                f"{path} holds episodes of seeds that another shard holds too: collect one of them with "
                "another seed="
            )
        seeds = torch.cat([seeds, own])
        shards.append(tensors)
    assert common is not None
    ends = torch.cat([s["episode_end"] for s in shards])
    first, last = episode_bounds(ends)
    task = common["task_index"]
    return Recording(
        latent=torch.cat([s["latent"] for s in shards]),
        plan=torch.cat([s["plan"] for s in shards]),
        drawn=torch.cat([s["drawn"] for s in shards]),
        teacher_action=torch.cat([s["plan"][:, 0] for s in shards]),
        first=first,
        last=last,
        seed=seeds[first.unique(return_inverse=True)[1]],
        teacher=teacher,
        task=None if task is None else torch.tensor(task),
    )


def episode_bounds(episode_end: Tensor) -> tuple[Tensor, Tensor]:
    """First and last step `[N]`, `[N]` of each step's episode, from the marks `[N]` of ends."""
    last = episode_end.nonzero().squeeze(1)
    lengths = last.diff(prepend=last.new_tensor([-1]))
    return (last - lengths + 1).repeat_interleave(lengths), last.repeat_interleave(lengths)


class Split(NamedTuple):
    """Steps that a stretch may start at, by what their episodes are for."""

    train: Tensor  # [n]
    validation: Tensor  # [m], to choose the best weights
    test: Tensor  # [l], to report how good those are


def split_starts(recording: Recording, every: int) -> Split:
    """Split by the seeds of the episodes, so that data added later leaves the rest where it was.

    Of `every` seeds in a row the first is for the test and the second for validation; where there is no
    such seed, the first episode that is left.

    Raises:
        DataError: there are fewer than three episodes of two steps or more.
    """
    followed = torch.arange(len(recording.last), device=recording.last.device) < recording.last
    seeds = recording.seed[followed].unique()
    if len(seeds) < 3:
        raise DataError(
            f"{len(seeds)} episodes cannot be split into training, validation and test: collect 3 or more"
        )
    test, validation = seeds[seeds % every == 0], seeds[seeds % every == 1]
    if len(test) + len(validation) == len(seeds):  # nothing to train on
        test, validation = seeds[:1], seeds[1:2]
    if not len(test):
        test = seeds[~torch.isin(seeds, validation)][:1]
    if not len(validation):
        validation = seeds[~torch.isin(seeds, test)][:1]
    is_test, is_validation = torch.isin(recording.seed, test), torch.isin(recording.seed, validation)
    shares = (~is_test & ~is_validation, is_validation, is_test)
    return Split(*((followed & share).nonzero().squeeze(1) for share in shares))


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    value = 0
    for name, tensor in sorted(tensors.items()):
        value = zlib.crc32(f"{name}{tuple(tensor.shape)}".encode(), value)
        value = zlib.crc32(tensor.numpy().data, value)
    return f"{value:08x}"
