"""World models on disk: the original's `.pt` files of both formats, and folders of ours.

A folder holds `model.safetensors` and `config.json`; other parts (training, correctors) add files and
entries of their own. An original file is a state dict; its architecture is read off the tensors' shapes:

    _encoder.state.0.weight [enc_dim, obs_dim + task_dim]   new and old format
    _Qs.params.0.weight     [num_q, mlp_dim, ...]           new format, heads by name
    _Qs.params.0 ... 9                                      old format, heads by number
"""

import hashlib
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..config import WorldModelConfig
from ..errors import CheckpointError, ConfigError, DataError
from ..files import atomic_write, read_json, write_json
from .model import WorldModel

CONFIG, WEIGHTS = "config.json", "model.safetensors"
FORMAT = "tdmpc2-world-model-1"

# The published 30-task set in its order, with each task's action dimensions; the 80-task set begins with
# it and goes on with 50 Meta-World tasks of four. Files in the old format do not carry the masks.
MT30 = {
    "walker-stand": 6,
    "walker-walk": 6,
    "walker-run": 6,
    "cheetah-run": 6,
    "reacher-easy": 2,
    "reacher-hard": 2,
    "acrobot-swingup": 1,
    "pendulum-swingup": 1,
    "cartpole-balance": 1,
    "cartpole-balance-sparse": 1,
    "cartpole-swingup": 1,
    "cartpole-swingup-sparse": 1,
    "cup-catch": 2,
    "finger-spin": 2,
    "finger-turn-easy": 2,
    "finger-turn-hard": 2,
    "fish-swim": 5,
    "hopper-stand": 4,
    "hopper-hop": 4,
    "walker-walk-backwards": 6,
    "walker-run-backwards": 6,
    "cheetah-run-backwards": 6,
    "cheetah-run-front": 6,
    "cheetah-run-back": 6,
    "cheetah-jump": 6,
    "hopper-hop-backwards": 4,
    "reacher-three-easy": 2,
    "reacher-three-hard": 2,
    "cup-spin": 2,
    "pendulum-spin": 1,
}
PUBLISHED_ACTION_DIMS = {30: tuple(MT30.values()), 80: (*MT30.values(), *(4,) * 50)}

# The published names of our modules, in either format.
PARTS = {
    "_encoder.state": "encoder",
    "_dynamics": "dynamics",
    "_reward": "reward_head",
    "_termination": "termination_head",
    "_pi": "policy",
    "_Qs.params": "q",
    "_target_Qs_params": "target_q",
}
# The order in which the old format numbers the parameters of a three-layer MLP.
NUMBERED = [
    f"{i}.{name}"
    for i, names in enumerate([["weight", "bias", "ln.weight", "ln.bias"]] * 2 + [["weight", "bias"]])
    for name in names
]


def our_name(name: str) -> str | None:
    """Our name of a parameter of an original file; None for an entry that carries nothing we need."""
    if name == "_task_emb.weight":
        return "task_emb"
    if numbered := re.fullmatch(r"(_Qs|_target_Qs)\.params\.(\d)", name):
        head = "q" if numbered[1] == "_Qs" else "target_q"
        return f"{head}.{NUMBERED[int(numbered[2])]}"
    if conv := re.fullmatch(r"_encoder\.rgb\.(\d)\.(weight|bias)", name):
        return f"encoder.{int(conv[1]) - 2}.{conv[2]}"  # the original's first two layers are not learned
    for original, ours in PARTS.items():
        if name.startswith(original + "."):
            rest = name[len(original) + 1 :]
            return f"{ours}.{rest}" if re.fullmatch(r"\d+\.(ln\.)?(weight|bias)", rest) else None
    return None


def load_world_model(path: str | Path, device: str | torch.device = "cpu") -> WorldModel:
    """Load an original checkpoint file or a folder of ours, in evaluation mode.

    Raises:
        CheckpointError: the file is missing, damaged, foreign, or a pickle that carries code.
        ConfigError: there is no such device here.
    """
    check_device(device)
    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"no checkpoint at {path}: give a .pt file or a folder with {CONFIG}")
    model = _load_folder(path) if path.is_dir() else _load_original(path)
    return model.to(device).eval().requires_grad_(False)


def check_device(device: str | torch.device) -> None:
    """Raise ConfigError for a device that cannot be used here."""
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as e:
        raise ConfigError(f"device={device}: cannot be used here; try device=cpu") from e


def save_world_model(folder: str | Path, model: WorldModel, **entries: Any) -> None:
    """Write `model` as a folder of ours; `entries` (JSON values) join its config.json."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: t.detach().cpu().contiguous() for name, t in model.state_dict().items()}
    with atomic_write(folder / WEIGHTS) as tmp:
        save_file(state, tmp)
    write_json(folder / CONFIG, {"format": FORMAT, "world_model": asdict(model.config), **entries})


def read_config(folder: str | Path) -> dict[str, Any]:
    """The config.json of a folder of ours.

    Raises:
        CheckpointError: it is missing, damaged, or not ours.
    """
    path = Path(folder) / CONFIG
    if not path.is_file():
        raise CheckpointError(f"{folder} holds no {CONFIG}: it is not a folder written by this package")
    try:
        config = read_json(path)
        known = config["format"] == FORMAT
    except (DataError, KeyError, TypeError) as e:
        raise CheckpointError(f"{path} is damaged: restore it from where it came") from e
    if not known:
        raise CheckpointError(f"{path} has format {config['format']!r}, this package reads {FORMAT!r}")
    return config


def saved_config(path: str | Path) -> dict[str, Any]:
    """`read_config` of a folder of ours; empty for an original file, which says nothing."""
    return read_config(path) if Path(path).is_dir() else {}


def published_task_index(task: str, num_tasks: int) -> int:
    """Index of a task in a published multi-task model.

    Raises:
        CheckpointError: the model is none of the published ones, or does not know the task.
    """
    if num_tasks not in PUBLISHED_ACTION_DIMS or task not in MT30:
        raise CheckpointError(
            f"a multi-task checkpoint of {num_tasks} tasks does not say which of them is {task}: only the "
            f"published 30- and 80-task models are known by name ({', '.join(MT30)})"
        )
    return list(MT30).index(task)


def fingerprint(model: nn.Module) -> str:
    """SHA-256 (16 hex digits) of the weights: names a network whatever file it came in."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().reshape(-1))
    return digest.hexdigest()[:16]


def _load_folder(folder: Path) -> WorldModel:
    try:
        entries = dict(read_config(folder)["world_model"])
        for name in ("obs_shape", "action_dims"):
            entries[name] = tuple(entries[name])
        config = WorldModelConfig(**entries)
        state = load_file(folder / WEIGHTS)
    except (SafetensorError, OSError, TypeError, KeyError, ValueError) as e:
        raise CheckpointError(f"{folder} is damaged ({_line(e)}): restore it from where it came") from e
    return _build(config, state, folder)


def _load_original(path: Path) -> WorldModel:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:
        if "Weights only load failed" in str(e) or "Unsupported" in str(e):
            raise CheckpointError(
                f"{path} is refused: it is not a plain file of tensors but a pickle that carries code or "
                "foreign objects; save its state dict with torch.save and load that"
            ) from e
        raise CheckpointError(
            f"{path} cannot be read ({_line(e)}): it is truncated or no PyTorch file; download it again"
        ) from e
    state = content.get("model", content) if isinstance(content, dict) else None
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} is not a TD-MPC2 checkpoint: it holds a {type(content).__name__}")
    renamed: dict[str, Tensor] = {}
    for name, value in state.items():
        # Tensors on the meta device only describe an uninitialised copy.
        carries = isinstance(name, str) and isinstance(value, Tensor) and value.device.type != "meta"
        if carries and (ours := our_name(name)):
            renamed[ours] = value.float()
    try:
        config = _read_architecture(state, renamed)
    except (KeyError, IndexError, ValueError) as e:
        raise CheckpointError(
            f"{path} is not a TD-MPC2 checkpoint: cannot read the architecture off its tensors ({_line(e)})"
        ) from e
    return _build(config, renamed, path)


def _read_architecture(original: dict[str, Any], state: dict[str, Tensor]) -> WorldModelConfig:
    """The architecture that has these tensors; KeyError or ValueError where none has."""
    num_q, mlp_dim, za_dim = state["q.0.weight"].shape
    num_bins = state["q.2.weight"].shape[1]
    action_dim = state["policy.2.weight"].shape[0] // 2
    num_tasks, task_dim = state["task_emb"].shape if "task_emb" in state else (0, 0)
    latent_dim = za_dim - action_dim - task_dim
    first = state["encoder.0.weight"]
    pixels = first.dim() == 4
    layers = len({name.split(".")[1] for name in state if name.startswith("encoder.")})
    action_dims: tuple[int, ...] = ()
    if num_tasks:
        masks = original.get("_action_masks")
        if masks is not None:
            action_dims = tuple(int(n) for n in masks.sum(-1))
        elif num_tasks in PUBLISHED_ACTION_DIMS:
            action_dims = PUBLISHED_ACTION_DIMS[num_tasks]
        else:
            raise ValueError(f"{num_tasks} tasks, no action masks, and not a published task set")
    log_std_min = float(original.get("log_std_min", -10.0))
    return WorldModelConfig(
        obs_shape=(first.shape[1], 64, 64) if pixels else (first.shape[1] - task_dim,),
        action_dim=action_dim,
        enc_dim=256 if pixels else first.shape[0],
        num_enc_layers=2 if pixels else layers,
        num_channels=first.shape[0] if pixels else 32,
        mlp_dim=mlp_dim,
        latent_dim=latent_dim,
        num_q=num_q,
        num_bins=num_bins,
        log_std_min=log_std_min,
        log_std_max=log_std_min + float(original.get("log_std_dif", 12.0)),
        episodic=any(name.startswith("termination_head.") for name in state),
        num_tasks=num_tasks,
        task_dim=task_dim,
        action_dims=action_dims,
    )


def _build(config: WorldModelConfig, state: dict[str, Tensor], path: Path) -> WorldModel:
    """A model of that architecture with these weights, every name and shape checked."""
    try:
        with torch.device("meta"):
            model = WorldModel(config)
    except Exception as e:
        raise CheckpointError(f"{path} describes a model that cannot be built ({_line(e)})") from e
    expected = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    found = {name: tuple(t.shape) for name, t in state.items()}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise CheckpointError(
                f"{path} is not a complete TD-MPC2 checkpoint: {name} should have shape "
                f"{expected.get(name, 'none (unknown)')} and has {found.get(name, 'none (missing)')}"
            )
    if broken := [name for name, t in state.items() if not torch.stack(t.aminmax()).isfinite().all()]:
        raise CheckpointError(f"{path} is damaged: {broken[0]} holds values that are not finite")
    # Copies, for what safetensors gives is the file itself: who writes to it would change the model.
    model.load_state_dict({name: t.clone() for name, t in state.items()}, assign=True)
    return model


def _line(error: BaseException) -> str:
    """The first line of an error's message, at most 120 characters."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:120]
