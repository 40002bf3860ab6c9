"""The state of a training run in one file, which is replaced whole or not at all.

Tensor names: `model/NAME`, `model_optim/INDEX/NAME`, `policy_optim/INDEX/NAME`, `q_scale`, `rng/SOURCE`. The
header contains the rest as JSON.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..files import read_tensors, write_tensors
from .update import Update

FORMAT = "tdmpc2-training-3"
AGAIN = "start a new run in another folder"


def save_state(
    path: Path, update: Update, generators: Mapping[str, torch.Generator], loop: Mapping[str, Any]
) -> None:
    """Write the whole state of a run, except its replay buffer.

    Args:
        path: the file.
        update: the learner, with model, optimisers and Q scale.
        generators: random generators by name, besides torch's global ones.
        loop: the rest, as JSON values.

    Raises:
        FileError: the file cannot be written.
    """
    tensors = _without_optimisers(update, generators)
    for name, optim in _optimisers(update).items():
        for index, state in optim.state_dict()["state"].items():
            tensors |= {f"{name}/{index}/{key}": value for key, value in state.items()}
    write_tensors(path, tensors, {"format": FORMAT, "loop": dict(loop)})


def read_state(path: Path, like: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the JSON values of a checkpoint.

    Args:
        path: the file.
        like: JSON values of the expected types; an int must not be negative.

    Raises:
        CheckpointError: the file is damaged or has another format.
        FileError: the file cannot be read.
    """
    tensors, about = read_tensors(path, FORMAT, AGAIN, CheckpointError)
    loop = about.get("loop")
    if not isinstance(loop, dict) or loop.keys() != like.keys():
        raise CheckpointError(f"{path} lacks the state of the run: {AGAIN}")
    for name, usual in like.items():
        value = loop[name]
        if type(value) is not type(usual) or (isinstance(value, int) and value < 0):
            raise CheckpointError(f"{path} holds {name}={str(value)[:40]}: {AGAIN}")
    return tensors, loop


def restore(
    path: Path,
    tensors: Mapping[str, Tensor],
    update: Update,
    generators: Mapping[str, torch.Generator],
) -> None:
    """Restore the learner and the generators from a checkpoint's tensors.

    Raises:
        CheckpointError: the tensors belong to another model.
    """
    like = _without_optimisers(update, generators)
    optimisers = _optimisers(update)
    if any(name.startswith(tuple(optimisers)) for name in tensors):  # saved after the first update
        for name, optim in optimisers.items():
            params = [p for group in optim.param_groups for p in group["params"]]
            for i, p in enumerate(params):
                moments = {"exp_avg": p, "exp_avg_sq": p, "step": p.new_zeros(())}
                like |= {f"{name}/{i}/{key}": tensor for key, tensor in moments.items()}
    for name in sorted(like.keys() | tensors.keys()):
        expected, found = _kind(like.get(name)), _kind(tensors.get(name))
        if expected != found:
            raise CheckpointError(
                f"{path} is of another model: {name} is {found}, not {expected}; has the environment "
                f"changed? {AGAIN}"
            )

    def under(prefix: str) -> dict[str, Tensor]:
        return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}

    update.model.load_state_dict(under("model/"))
    for name, optim in optimisers.items():
        state: dict[int, dict[str, Tensor]] = {}
        for key, tensor in under(f"{name}/").items():
            index, entry = key.split("/")
            state.setdefault(int(index), {})[entry] = tensor
        optim.load_state_dict({**optim.state_dict(), "state": state})
    update.q_scale.copy_(tensors["q_scale"])
    try:
        torch.set_rng_state(tensors["rng/torch"])
        if update.q_scale.is_cuda:
            torch.cuda.set_rng_state(tensors["rng/cuda"])
        for name, generator in generators.items():
            generator.set_state(tensors[f"rng/{name}"])
    except RuntimeError as e:
        raise CheckpointError(f"{path} has an invalid random generator state ({e}): {AGAIN}") from e


def _without_optimisers(update: Update, generators: Mapping[str, torch.Generator]) -> dict[str, Tensor]:
    tensors = {f"model/{name}": t for name, t in update.model.state_dict().items()}
    tensors["q_scale"] = update.q_scale
    tensors["rng/torch"] = torch.get_rng_state()
    if update.q_scale.is_cuda:
        tensors["rng/cuda"] = torch.cuda.get_rng_state()
    return tensors | {f"rng/{name}": g.get_state() for name, g in generators.items()}


def _optimisers(update: Update) -> dict[str, torch.optim.Optimizer]:
    return {"model_optim": update.model_optim, "policy_optim": update.policy_optim}


def _kind(tensor: Tensor | None) -> str:
    return "missing" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"
