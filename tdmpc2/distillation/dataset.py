"""Corrector data: shards of whole episodes on disk, and one `Recording` of all shards in memory.

A shard is a file of tensors, see `files.py`. Its axis `T` runs over the steps of all its episodes in order:

    step            0    1    2  ...  499  500  501 ...
    episode_end     0    0    0         1    0    0           1: cut off, 2: terminated
    plan            the teacher's mean plan, made at this step; its first action is the label
    drawn           the first action of the teacher's sampled plan, which TD-MPC2 would execute
    action          the executed action

Every step has its own plan and label, so training can start a segment at any step (see `losses.py`) and with
data from any mode. Observations are not stored, because training reads latents. The header names task,
teacher, budget, seeds, behaviours (the acting modes) and bursts.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import DataError
from ..files import difference, read_tensors, write_tensors

FORMAT = "tdmpc2-corrector-data-3"
# dtype and axes: T steps, L latent entries, H planned steps, A action dimensions.
TENSORS = {
    "latent": (torch.float32, "TL"),
    "plan": (torch.float32, "THA"),
    "drawn": (torch.float32, "TA"),
    "action": (torch.float32, "TA"),
    "reward": (torch.float32, "T"),
    "episode_end": (torch.uint8, "T"),
}
HEADER = {
    "task": (str,),
    "task_index": (int, type(None)),  # of a multi-task model
    "teacher": (str,),  # fingerprint
    "planner": (dict,),
    "discount": (float,),
    "behaviours": (list,),
    "bursts": (bool,),
    "seeds": (list,),  # of the episodes, in order
}
# Entries that may differ between shards that are read together.
VARYING = ("seeds", "behaviours", "bursts")
AGAIN = "delete it and collect it again"


class Recording(NamedTuple):
    """Steps of whole episodes, in order."""

    latent: Tensor  # [N, L]
    plan: Tensor  # [N, H, A]
    drawn: Tensor  # [N, A], first actions of sampled plans
    teacher_action: Tensor  # [N, A], first actions of mean plans: the labels
    first: Tensor  # [N] long, index of the episode's first step
    last: Tensor  # [N] long, index of the episode's last step
    seed: Tensor  # [N] long, the episode's seed
    teacher: str  # fingerprint of the world model
    task: Tensor | None = None  # [] long, task index in a multi-task model

    def to(self, device: str | torch.device) -> "Recording":
        moved = [x.to(device) if isinstance(x, Tensor) else x for x in self]
        return Recording(*moved)  # type: ignore[arg-type]


def write_shard(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    """Write a shard, whole or not at all; `tensors` as in `TENSORS`, `header` as in `HEADER`."""
    write_tensors(path, tensors, {**header, "format": FORMAT})


def read_shard(path: Path, teacher: str | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and header of a shard.

    Args:
        path: the file.
        teacher: fingerprint of the world model that it must belong to; None: any.

    Raises:
        DataError: the shard is damaged, has another format, or belongs to another teacher.
        FileError: the shard cannot be read.
    """
    tensors, header = read_tensors(path, FORMAT, AGAIN, DataError)
    if fault := _fault(tensors, header):
        raise DataError(f"{path} is damaged, {fault}: {AGAIN}")
    if teacher is not None and header["teacher"] != teacher:
        raise DataError(
            f"{path} belongs to teacher {header['teacher']}, this one is {teacher}: collect data with it"
        )
    return tensors, header


def _fault(tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> str:
    """What is wrong with a shard, in words; "": nothing."""
    for name, kinds in HEADER.items():
        if type(header.get(name)) not in kinds:
            return f"its header has no {name} of the right type"
    seeds = header["seeds"]
    if not all(type(seed) is int and 0 <= seed < 2**63 for seed in seeds) or len(set(seeds)) < len(seeds):
        return "its seeds are not distinct whole numbers"
    if tensors.keys() != TENSORS.keys():
        return f"it holds {', '.join(sorted(tensors))}"
    sizes: dict[str, int] = {}
    for name, (dtype, axes) in TENSORS.items():
        tensor = tensors[name]
        fits = tensor.dtype == dtype and tensor.dim() == len(axes) and tensor.numel() > 0
        if not fits or any(sizes.setdefault(a, n) != n for a, n in zip(axes, tensor.shape, strict=True)):
            return f"its {name} is {tensor.dtype} {list(tensor.shape)}"
        if not tensor.isfinite().all():
            return f"its {name} is not finite"
    ends = tensors["episode_end"]
    if not ends[-1] or int((ends > 0).sum()) != len(seeds):
        return f"it holds {int((ends > 0).sum())} episodes and {len(seeds)} seeds"
    return ""


def load_shards(folder: str | Path, teacher: str) -> Recording:
    """Load all shards of a folder and its subfolders, in the order of their paths.

    Args:
        folder: contains `shard-*.safetensors`.
        teacher: fingerprint of the world model that the shards must belong to.

    Raises:
        DataError: there are no shards, one is damaged or belongs to another teacher, they differ in task or
            planner, or two contain an episode with the same seed.
        FileError: a shard cannot be read.
    """
    paths = sorted(Path(folder).rglob("shard-*.safetensors"))
    if not paths:
        raise DataError(f"no shards in {folder}: make some with `tdmpc2 collect`")
    shards, seeds = [], torch.zeros(0, dtype=torch.long)
    common: dict[str, Any] = {}
    for path in paths:
        tensors, header = read_shard(path, teacher)
        shared = {name: value for name, value in header.items() if name not in VARYING}
        shared["shapes"] = [list(tensors[name].shape[1:]) for name in TENSORS]
        common = common or shared
        if differs := difference(common, shared):
            raise DataError(
                f"{path} and {paths[0]} differ: {differs}; collect them into folders of different data="
            )
        own = torch.tensor(header["seeds"])
        if torch.isin(own, seeds).any():
            raise DataError(
                f"{path} has episodes with seeds that another shard has too: collect one of them with "
                "another seed="
            )
        seeds = torch.cat([seeds, own])
        shards.append(tensors)
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


def episode_returns(folder: str | Path) -> Tensor:
    """Returns `[E]` of the episodes in a folder of shards, in any order; errors as in `load_shards`."""
    returns = []
    for path in Path(folder).glob("shard-*.safetensors"):
        tensors, _ = read_shard(path)
        ends = (tensors["episode_end"].nonzero().squeeze(1) + 1).tolist()
        returns += [r.sum() for r in tensors["reward"].tensor_split(ends[:-1])]
    return torch.stack(returns)


def episode_bounds(episode_end: Tensor) -> tuple[Tensor, Tensor]:
    """Indices `[N]`, `[N]` of the first and last step of each step's episode, from `episode_end` `[N]`."""
    last = episode_end.nonzero().squeeze(1)
    lengths = last.diff(prepend=last.new_tensor([-1]))
    return (last - lengths + 1).repeat_interleave(lengths), last.repeat_interleave(lengths)


class Split(NamedTuple):
    """Steps where a segment may start, by the use of their episodes."""

    train: Tensor  # [n]
    validation: Tensor  # [m], to choose the best weights
    test: Tensor  # [l], to report their error


def split_starts(recording: Recording, every: int) -> Split:
    """Split by the episodes' seeds, so later data does not move earlier episodes.

    Seeds divisible by `every` are for the test; the seeds after them are for validation. If there are no such
    seeds, the first remaining episode is used.

    Raises:
        DataError: there are fewer than three episodes of at least two steps: correctors act after a plan's
            first step.
    """
    followed = torch.arange(len(recording.last), device=recording.last.device) < recording.last
    seeds = recording.seed[followed].unique()
    if len(seeds) < 3:
        raise DataError(
            f"{len(recording.seed.unique())} episodes were collected, and {len(seeds)} of them have at least "
            "two steps, which a corrector needs; training, validation and test need three: collect more"
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
