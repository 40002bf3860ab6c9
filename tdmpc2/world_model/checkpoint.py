"""World models on disk: the original's `.pt` files, and our folders.

A folder holds `model.safetensors` and `config.json`; training and correctors add files and entries. An
original file is a state dict; its architecture is read from the shapes of its tensors. Three formats were
published:

    _dynamics.0.weight, .0.ln.weight      _Qs.params.0.weight    new: Q heads by name, [num_q, mlp_dim, ...]
    _dynamics.0.weight, .0.ln.weight      _Qs.params.0 ... 9     old: Q heads by number
    _dynamics.0.0.weight, .0.1.weight     _Qs.params.0 ... 9     oldest: Linear and LayerNorm as two layers
"""

import hashlib
import re
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..checked import check_range, check_type, from_json
from ..config import ComputeConfig, WorldModelConfig
from ..errors import CheckpointError, ConfigError, DataError, TDMPC2Error
from ..files import exists, open_file, read_json, read_tensors, write_json, write_tensors
from .layers import Linear
from .model import WorldModel

CONFIG, WEIGHTS = "config.json", "model.safetensors"
FORMAT = "tdmpc2-world-model-1"
T = TypeVar("T")
# Optional entries of config.json.
ENTRIES = {
    "task": str,
    "discount": float,
    "precision": str,
    "task_index": int | None,
    "weights": str,
    "mode": str,
    "eval_return": float,
    "step": int,
    "provenance": dict,
}

# The published 30-task set in its order, with each task's number of action dimensions; the 80-task set adds
# 50 tasks of Meta-World. Files in the old formats have no action masks.
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
META_WORLD = """
    assembly basketball button-press-topdown button-press-topdown-wall button-press button-press-wall
    coffee-button coffee-pull coffee-push dial-turn disassemble door-open door-close drawer-close
    drawer-open faucet-open faucet-close hammer handle-press-side handle-press handle-pull-side
    handle-pull lever-pull peg-insert-side peg-unplug-side pick-out-of-hole pick-place pick-place-wall
    plate-slide plate-slide-side plate-slide-back plate-slide-back-side push-back push push-wall reach
    reach-wall shelf-place soccer stick-push stick-pull sweep-into sweep window-open window-close
    bin-picking box-close door-lock door-unlock hand-insert
""".split()  # noqa: SIM905
PUBLISHED = {30: MT30, 80: MT30 | {f"mw-{name}": 4 for name in META_WORLD}}  # by number of tasks

# The published names of our modules.
PARTS = {
    "_encoder.state": "encoder",
    "_dynamics": "dynamics",
    "_reward": "reward_head",
    "_termination": "termination_head",
    "_pi": "policy",
    "_Qs.params": "q",
    "_target_Qs_params": "target_q",
}
# The order of the parameters of a three-layer MLP in the old formats.
NUMBERED = [
    f"{i}.{name}"
    for i, names in enumerate([["weight", "bias", "ln.weight", "ln.bias"]] * 2 + [["weight", "bias"]])
    for name in names
]
UNSAID = ("vmin", "vmax", "simnorm_dim")
WRAPPERS = ("model", "state_dict")  # keys that may contain the state dict
# Prefixes of published names, from compiling, parallel training and users' own modules.
IN_FRONT = re.compile(
    r"^(?:\w+\.)*?(?=(?:_encoder|_dynamics|_reward|_termination|_pi|_Qs|_target_Qs|_target_Qs_params"
    r"|_task_emb|_action_masks|log_std_min|log_std_dif)(?:\.|$))"
)


def our_name(name: str) -> str | None:
    """Our name of a parameter of an original file; None if we do not need the entry."""
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


def fused_name(name: str) -> str:
    """The old format's name of a parameter in the oldest format.

    In the oldest format a hidden layer is a Linear, a LayerNorm and an activation, so every third layer is a
    Linear. The encoder has one more layer in front, and the last norm of the dynamics is `_dynamics.1`.
    """
    found = re.fullmatch(r"(_encoder\.state|_dynamics\.0|_dynamics|_reward|_pi)\.(\d+)\.(weight|bias)", name)
    if found is None:
        return name
    part, index = found[1], int(found[2])
    if part == "_encoder.state":
        index -= 1
    elif part == "_dynamics":
        index += 6
    return f"{part.removesuffix('.0')}.{index // 3}.{'ln.' * (index % 3)}{found[3]}"


@torch.inference_mode(False)
def load_world_model(
    path: str | Path,
    device: str | torch.device = "cpu",
    *,
    vmin: float | None = None,
    vmax: float | None = None,
    simnorm_dim: int | None = None,
) -> WorldModel:
    """Load an original checkpoint file or our folder, in evaluation mode.

    An original file does not contain `vmin`, `vmax` and `simnorm_dim`; None means the published value.

    Args:
        path: the file or folder.
        device: to compute on.
        vmin: first bin of rewards and values, in symlog units; None: -10.
        vmax: last bin, in symlog units; None: 10.
        simnorm_dim: entries per simplex of the latent; None: 8.

    Raises:
        CheckpointError: the file is missing, damaged, foreign, or a pickle that contains code.
        FileError: the file cannot be read.
        ConfigError: there is no such device, or a folder has other values of `vmin`, `vmax`, `simnorm_dim`.
    """
    check_device(device)
    path = Path(path)
    given = {"vmin": vmin, "vmax": vmax, "simnorm_dim": simnorm_dim}
    given = {name: value for name, value in given.items() if value is not None}
    if not exists(path):
        raise CheckpointError(f"no checkpoint at {path}: give a .pt file or a folder with {CONFIG}")
    model = _load_folder(path, given) if path.is_dir() else _load_original(path, given)
    return model.to(device).eval().requires_grad_(False)


def check_device(device: str | torch.device) -> None:
    """Raise ConfigError if this machine cannot use the device."""
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as e:
        raise ConfigError(f"device={device}: this machine cannot use it; try device=cpu") from e


def save_world_model(folder: str | Path, model: WorldModel, **entries: Any) -> None:
    """Write `model` as a folder; `entries` (JSON values) are added to its config.json."""
    folder = Path(folder)
    write_tensors(folder / WEIGHTS, model.state_dict(), {"format": FORMAT})
    config = {"format": FORMAT, "world_model": asdict(model.config), "weights": fingerprint(model)}
    write_json(folder / CONFIG, config | entries)


def read_config(path: str | Path) -> dict[str, Any]:
    """A folder's config.json, with checked types of `ENTRIES`; {} for an original file.

    Raises:
        CheckpointError: the file is missing, damaged, or has another format.
        FileError: the file cannot be read.
    """
    folder = Path(path)
    if not folder.is_dir():
        return {}
    path = folder / CONFIG
    if not exists(path):
        raise CheckpointError(_instead(folder))
    try:
        config = read_json(path)
        found = config["format"]
    except (DataError, KeyError, TypeError) as e:
        raise CheckpointError(f"{path} is damaged: download it or make it again") from e
    if found != FORMAT:
        raise CheckpointError(f"{path} has format {found!r}, but this package reads {FORMAT!r}")
    try:
        for name, hint in ENTRIES.items():
            if name in config:
                check_type(name, config[name], hint)
        check_range("discount", config.get("discount", 1), 0, 1)
        ComputeConfig(config.get("precision", ComputeConfig.precision))
    except ConfigError as e:
        raise CheckpointError(f"{path}: {e}; download it or make it again") from e
    return config


def saved_as(cls: type[T], settings: Any, path: str | Path) -> T:
    """A config from a folder; CheckpointError if it does not fit this version."""
    try:
        return from_json(cls, settings)
    except ConfigError as e:
        raise CheckpointError(f"{path} has settings that do not fit this version: {e}") from e


def spelling(task: str) -> str:
    """A normalised spelling of a task's name: dm_control's and TD-MPC2's differ."""
    return task.lower().replace("_", "-").replace("ball-in-cup", "cup").replace("point-mass", "pointmass")


def published_task_index(task: str, num_tasks: int) -> int:
    """Index of a task, in any spelling, in a published multi-task model.

    Raises:
        CheckpointError: the model is not a published one, or was not trained on the task.
    """
    if num_tasks not in PUBLISHED:
        raise CheckpointError(
            f"a multi-task checkpoint of {num_tasks} tasks does not name {task}: give the task's index; "
            "names work only for the published 30- and 80-task models"
        )
    names = list(PUBLISHED[num_tasks])
    if spelling(task) not in names:
        raise CheckpointError(
            f"the published {num_tasks}-task models were not trained on {task}, but on {', '.join(names)}"
        )
    return names.index(spelling(task))


def fingerprint(model: nn.Module) -> str:
    """SHA-256 (16 hex digits) of the weights, independent of the file format.

    Bins and simplices count too if they are not the published ones.
    """
    digest = hashlib.sha256()
    if isinstance(model, WorldModel):
        said, published = ([getattr(c, name) for name in UNSAID] for c in (model.config, WorldModelConfig))
        if said != published:
            digest.update(" ".join(str(float(value)) for value in said).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().reshape(-1))
    return digest.hexdigest()[:16]


def fill(module: nn.Module, state: Mapping[str, Tensor], path: Path) -> None:
    """Check the tensors in `state`, and give them to a module made on the meta device.

    Args:
        module: float32.
        state: as `module.state_dict()`.
        path: their file.

    Raises:
        CheckpointError: a tensor is missing or unknown, has another shape or dtype, or is not finite.
    """
    expected = {name: f"{tuple(t.shape)}" for name, t in module.state_dict().items()}
    found = {name: f"{tuple(t.shape)}" for name, t in state.items()}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise CheckpointError(
                f"{path} is damaged or incomplete: {name} should have shape "
                f"{expected.get(name, 'none (unknown)')}, but has {found.get(name, 'none (missing)')}"
            )
        if state[name].dtype != torch.float32:
            raise CheckpointError(f"{path} is damaged: {name} is {state[name].dtype}, not torch.float32")
        if not torch.stack(state[name].aminmax()).isfinite().all():
            raise CheckpointError(f"{path} is damaged: {name} has values that are not finite")
    # Copies: a view would keep a larger block of memory alive. Matrices are stored along their outputs: a
    # product with few rows, as in acting, is then up to four times as fast.
    matrices = {f"{name}.weight" for name, x in module.named_modules() if isinstance(x, (Linear, nn.Linear))}
    own = {name: _along_outputs(t) if name in matrices else t.clone() for name, t in state.items()}
    module.load_state_dict(own, assign=True)


def _along_outputs(weight: Tensor) -> Tensor:
    """A copy of weights `[..., out, in]` in which the entries of different outputs lie side by side."""
    return weight.mT.clone(memory_format=torch.contiguous_format).mT


def _load_folder(folder: Path, given: Mapping[str, Any]) -> WorldModel:
    saved = read_config(folder)
    config = saved_as(WorldModelConfig, saved.get("world_model"), folder / CONFIG)
    for name, value in given.items():
        if value != getattr(config, name):
            raise ConfigError(f"{name}={value}: {folder} has {name}={getattr(config, name)}")
    path, again = folder / WEIGHTS, "download it or make it again"
    # Files of earlier versions have no header.
    state, _ = read_tensors(path, FORMAT, again, CheckpointError, bare=True)
    model = _empty(config)
    fill(model, state, path)
    if "weights" in saved and saved["weights"] != fingerprint(model):
        raise CheckpointError(f"{path} is of another model than {CONFIG} beside it: download both again")
    return model


def _load_original(path: Path, given: Mapping[str, Any]) -> WorldModel:
    if path.suffix in (".safetensors", ".json"):
        raise CheckpointError(_instead(path))
    content = _read_pickle(path)
    for _ in WRAPPERS:
        if isinstance(content, dict):
            content = next((content[key] for key in WRAPPERS if key in content), content)
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is not a TD-MPC2 checkpoint: it holds a {type(content).__name__}")
    original: dict[str, Any] = {}
    for name, value in content.items():
        # Tensors on the meta device have no values.
        if isinstance(name, str) and not (isinstance(value, Tensor) and value.is_meta):
            plain = IN_FRONT.sub("", name.replace("_orig_mod.", ""))
            if plain in original:
                raise CheckpointError(f"{path} holds more than one model: it has {plain} twice")
            original[plain] = value
    oldest = "_dynamics.0.0.weight" in original
    state: dict[str, Tensor] = {}
    for name, value in original.items():
        if isinstance(value, Tensor) and (ours := our_name(fused_name(name) if oldest else name)):
            state[ours] = _checked(value, name, path)
    if sum(t.numel() * t.element_size() for t in state.values()) > path.stat().st_size:
        raise CheckpointError(f"{path} is refused: its tensors claim to be larger than the file")
    state = {name: t.float() for name, t in state.items()}
    if not any(name.startswith("target_q.") for name in state):  # not needed to act
        state |= {f"target_{name}": t for name, t in state.items() if name.startswith("q.")}
    try:
        config = _read_architecture(original, state, given)
    except ConfigError as e:
        raise CheckpointError(f"{path} cannot be used: {e}") from e
    except (LookupError, ValueError, TypeError, RuntimeError, OverflowError) as e:
        raise CheckpointError(
            f"{path} is not a TD-MPC2 checkpoint: its tensors do not fit the architecture ({_line(e)})"
        ) from e
    model = _empty(config)
    fill(model, state, path)
    return model


def _read_pickle(path: Path) -> Any:
    """The content of a torch.save file, with verified checksums; runs no code."""
    with open_file(path) as file:
        size = path.stat().st_size
        try:
            with zipfile.ZipFile(file) as archive:
                entries = archive.infolist()
                stored = all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)
                if not stored or sum(entry.file_size for entry in entries) > size:
                    raise CheckpointError(f"{path} is refused: it unpacks to more than its {size:,} bytes")
                if damaged := archive.testzip():
                    raise CheckpointError(
                        f"{path} is damaged: the checksum of {damaged} is wrong; download it again"
                    )
            file.seek(0)
            with warnings.catch_warnings(action="ignore"):  # about deprecated formats
                return torch.load(file, map_location="cpu", weights_only=True)
        except TDMPC2Error:
            raise
        except Exception as e:
            if "Weights only load failed" in str(e) or "Unsupported" in str(e):
                raise CheckpointError(
                    f"{path} is refused: it is a pickle that contains code or foreign objects; save only its "
                    "state dict with torch.save"
                ) from e
            raise CheckpointError(
                f"{path} cannot be read ({_line(e)}): it is truncated or no PyTorch file; download it again"
            ) from e


def _checked(value: Tensor, name: str, path: Path) -> Tensor:
    """A tensor of an original file; raises CheckpointError unless it is dense and of floats."""
    dense = value.layout is torch.strided and not value.is_nested and not value.is_quantized
    if not (dense and value.is_floating_point()):
        raise CheckpointError(f"{path} is refused: {name} is not a dense tensor of floats")
    return value.detach()


def _read_architecture(
    original: Mapping[str, Any], state: Mapping[str, Tensor], given: Mapping[str, Any]
) -> WorldModelConfig:
    """The architecture with these tensors; raises an error with the reason if there is none.

    Args:
        original: entries by their published names.
        state: tensors by our names.
        given: settings that the file does not contain.
    """
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
            if not isinstance(masks, Tensor) or masks.shape != (num_tasks, action_dim):
                raise ValueError(f"_action_masks must have shape {(num_tasks, action_dim)}")
            action_dims = tuple(int(n) for n in masks.sum(-1))
        elif num_tasks in PUBLISHED:
            action_dims = tuple(PUBLISHED[num_tasks].values())
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
        **given,
    )


def _empty(config: WorldModelConfig) -> WorldModel:
    """A model without weights."""
    with torch.device("meta"):
        return WorldModel(config)


def _instead(path: Path) -> str:
    """An error message that says what to give instead of `path`, our file or a folder without `CONFIG`."""
    folder = path if path.is_dir() else path.parent
    if path != folder and (folder / CONFIG).exists():
        return f"{path} is part of a folder: give {folder}"
    if (folder / "teacher").is_dir():
        return f"{path} belongs to a training run: give its teacher, {folder / 'teacher'}"
    if (folder / "train_config.json").exists():
        return f"{path} belongs to a training run without a teacher: its first evaluation saves one"
    if (folder / "settings.json").exists() and (folder / "data").is_dir():
        return f"{path} belongs to an unfinished run of `tdmpc2 accelerate`: run it again"
    if (folder / "corrector.safetensors").exists():
        return f"{path} is a corrector: give its teacher or its agent"
    if path == folder and (found := sorted(folder.glob(f"*/{CONFIG}"))):
        return f"{path} has no {CONFIG}, but subfolders with one: give one of them, e.g. {found[0].parent}"
    if path == folder:
        return f"{path} has no {CONFIG}: this package did not write it"
    return (
        f"{path} alone is no checkpoint: give an original .pt file, or a folder with {CONFIG} and {WEIGHTS}"
    )


def _line(error: BaseException) -> str:
    """The first line of an error's message, at most 120 characters."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:120]
