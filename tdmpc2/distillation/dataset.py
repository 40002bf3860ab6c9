"""Corrector data: shards of whole episodes on disk, and one `Recording` of them all in memory.

A shard is a file of tensors, see `files.py`. Its steps stand one after another, episode after episode:

    step            0    1    2  ...  499  500  501 ...
    episode_end     0    0    0         1    0    0           1: cut off, 2: terminated
    plan            the mean of the plan that the teacher made *from that very step*, at every step; its
                    first action is the teacher's answer there
    drawn           the action that TD-MPC2 would have executed there
    action          what was executed, by whatever behaviour drove the episode

Every state carries its own plan and its own label, so a segment of any length can be cut out when the data is
read (see `losses.py`), whoever drove. Observations are not kept: training reads latents. The header names
task, teacher, budget, seeds, behaviours and bursts.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import DataError
from ..files import difference, read_tensors, write_tensors

FORMAT = "tdmpc2-corrector-data-3"
# Of T steps with latents of L, plans of H steps, and A action dimensions.
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
# Entries in which shards may differ and still be read together.
VARYING = ("seeds", "behaviours", "bursts")
AGAIN = "delete it and collect it again"


class Recording(NamedTuple):
    """Steps of whole episodes, one after another."""

    latent: Tensor  # [N, L]
    plan: Tensor  # [N, H, A]
    drawn: Tensor  # [N, A], what TD-MPC2 would have executed
    teacher_action: Tensor  # [N, A], the mean plan's, which correctors are trained on
    first: Tensor  # [N] long, index of the first step of the step's episode
    last: Tensor  # [N] long, index of its last step
    seed: Tensor  # [N] long, seed of the step's episode
    teacher: str  # fingerprint of the world model
    task: Tensor | None = None  # [] long, index of the task of a multi-task model

    def to(self, device: str | torch.device) -> "Recording":
        moved = [x.to(device) if isinstance(x, Tensor) else x for x in self]
        return Recording(*moved)  # type: ignore[arg-type]


def write_shard(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    """Write a shard, whole or not at all; `tensors` are those of `TENSORS`, `header` is `HEADER` in JSON."""
    write_tensors(path, tensors, {**header, "format": FORMAT})


def read_shard(path: Path, teacher: str | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and header of a shard.

    Args:
        path: the file.
        teacher: fingerprint of the world model that it must belong to; None takes any.

    Raises:
        DataError: the shard is damaged, of another format, or of another teacher.
        FileError: it may not be read.
    """
    tensors, header = read_tensors(path, FORMAT, AGAIN, DataError)
    if fault := _fault(tensors, header):
        raise DataError(f"{path} is damaged, {fault}: {AGAIN}")
    if teacher is not None and header["teacher"] != teacher:
        raise DataError(
            f"{path} belongs to teacher {header['teacher']}, this one is {teacher}: collect data of its own"
        )
    return tensors, header


def _fault(tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> str:
    """What is wrong with a shard, in words; "" where nothing is."""
    for name, kinds in HEADER.items():
        if type(header.get(name)) not in kinds:
            return f"its header has no {name}, or not as this version has it"
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
    """All shards of a folder and of the folders within, in the order of their paths.

    Args:
        folder: of `shard-*.safetensors`.
        teacher: fingerprint of the world model that they must belong to.

    Raises:
        DataError: there is none, one is damaged or belongs to another teacher, they were not all
            labelled by the same planner on the same task, or two hold an episode of the same seed.
        FileError: one may not be read.
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
                f"{path} and {paths[0]} differ: {differs}; collect them into folders of their own"
            )
        own = torch.tensor(header["seeds"])
        if torch.isin(own, seeds).any():
            raise DataError(
                f"{path} holds episodes of seeds that another shard holds too: collect one of them with "
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
    """Returns `[E]` of the episodes in a folder of shards, in no order; raises as `load_shards`."""
    returns = []
    for path in Path(folder).glob("shard-*.safetensors"):
        tensors, _ = read_shard(path)
        ends = (tensors["episode_end"].nonzero().squeeze(1) + 1).tolist()
        returns += [r.sum() for r in tensors["reward"].tensor_split(ends[:-1])]
    return torch.stack(returns)


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
        DataError: there are fewer than three episodes of two steps or more: correctors act after a plan's
            first step.
    """
    followed = torch.arange(len(recording.last), device=recording.last.device) < recording.last
    seeds = recording.seed[followed].unique()
    if len(seeds) < 3:
        raise DataError(
            f"{len(recording.seed.unique())} episodes were collected, and {len(seeds)} of them have the two "
            "steps or more that a corrector needs; training, validation and test need three: collect more"
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
