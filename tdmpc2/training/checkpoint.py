"""The state of a training run in one file, so that it is replaced whole or not at all.

A safetensors file holds the tensors; its header holds the rest as JSON. Tensor names: `model/NAME`,
`model_optim/INDEX/NAME`, `policy_optim/INDEX/NAME`, `q_scale`, `rng/SOURCE`.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..files import atomic_write, read_metadata
from .update import Update

FORMAT = "tdmpc2-training-1"


def save_state(
    path: Path, update: Update, generators: dict[str, torch.Generator], loop: dict[str, Any]
) -> None:
    """Write everything that the future of a run depends on, except its replay buffer.

    Args:
        path: the file.
        update: the learner, with model, optimisers and Q scale.
        generators: sources of randomness by name, besides torch's global ones.
        loop: the rest, as JSON values.
    """
    tensors = {f"model/{name}": t for name, t in update.model.state_dict().items()}
    for name, optim in _optimisers(update).items():
        for index, state in optim.state_dict()["state"].items():
            tensors |= {f"{name}/{index}/{key}": value for key, value in state.items()}
    tensors["q_scale"] = update.q_scale
    tensors["rng/torch"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["rng/cuda"] = torch.cuda.get_rng_state()
    tensors |= {f"rng/{name}": g.get_state() for name, g in generators.items()}
    tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    header = json.dumps({"format": FORMAT, **loop})
    with atomic_write(path) as tmp:
        save_file(tensors, tmp, metadata={"state": header})


def read_loop(path: Path) -> dict[str, Any]:
    """The JSON values of a checkpoint.

    Raises:
        CheckpointError: it is damaged or not ours.
    """
    return read_metadata(path, "state", FORMAT, "start the run anew elsewhere")


def load_state(path: Path, update: Update, generators: dict[str, torch.Generator]) -> None:
    """Put a checkpoint's tensors and generator states where they were taken from."""
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118

    def under(prefix: str) -> dict[str, Tensor]:
        return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}

    update.model.load_state_dict(under("model/"))
    for name, optim in _optimisers(update).items():
        state: dict[int, dict[str, Tensor]] = {}
        for key, tensor in under(f"{name}/").items():
            index, entry = key.split("/")
            state.setdefault(int(index), {})[entry] = tensor
        optim.load_state_dict({**optim.state_dict(), "state": state})
    update.q_scale.copy_(tensors["q_scale"])
    torch.set_rng_state(tensors["rng/torch"])
    if torch.cuda.is_available() and "rng/cuda" in tensors:
        torch.cuda.set_rng_state(tensors["rng/cuda"])
    for name, generator in generators.items():
        generator.set_state(tensors[f"rng/{name}"])


def _optimisers(update: Update) -> dict[str, torch.optim.Optimizer]:
    return {"model_optim": update.model_optim, "policy_optim": update.policy_optim}
