"""What a control loop hands to an agent, checked before anything changes: observations and masks of rows."""

from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from .config import WorldModelConfig
from .errors import ConfigError, ObservationError, TDMPC2Error

Array = TypeVar("Array", np.ndarray, Tensor)


def read_observation(
    obs: object, config: WorldModelConfig, num_envs: int, device: torch.device | str
) -> Tensor:
    """Observations `[B, *obs_shape]`: float32, or the whole numbers of pixels, on `device`.

    Args:
        obs: array, tensor or nested sequence of numbers `[B, *obs_shape]`, or of one row `[*obs_shape]`.
        config: says the shape.
        num_envs: B.
        device: to act on.

    Raises:
        ObservationError: it is something else, or has another shape.
    """
    if isinstance(obs, tuple) and obs and isinstance(obs[-1], dict):
        raise ObservationError(
            "observation is a tuple that ends with a dict, as env.reset() and env.step() return: "
            "pass its first entry"
        )
    x = _numbers(obs, "observation", ObservationError)
    shape = config.obs_shape
    if tuple(x.shape) == shape:
        x = x[None]
    if tuple(x.shape) != (num_envs, *shape):
        raise ObservationError(
            f"observation has shape {tuple(x.shape)}; this agent takes {(num_envs, *shape)}: "
            "the checkpoint may be of another task"
        )
    if config.pixels:
        if x.dtype == torch.uint8:
            return x.to(device)
        if x.is_floating_point() or not ((x.long() >= 0) & (x.long() <= 255)).all():
            raise ObservationError(
                f"observation holds pixels of {x.dtype}: whole numbers from 0 to 255 are expected, uint8"
            )
        return x.to(device, torch.uint8)
    return x.to(device, torch.float32)


def read_mask(mask: object, num_envs: int, device: torch.device | str) -> Tensor | slice:
    """The rows that a mask chooses, as an index; None is all of them.

    Args:
        mask: `[B]` bool, or numbers that are 0 or 1; of one row also a single one.
        num_envs: B.
        device: of the index.

    Raises:
        ConfigError: it is something else.
    """
    if mask is None:
        return slice(None)
    x = _numbers(mask, "mask", ConfigError).to(torch.float64)
    if num_envs == 1 and x.dim() == 0:
        x = x[None]
    if tuple(x.shape) != (num_envs,):
        raise ConfigError(
            f"mask has shape {tuple(x.shape)}: it must have one entry for each of {num_envs} rows"
        )
    chosen = x != 0
    if not (chosen == x).all():
        raise ConfigError("mask holds other numbers than 0 and 1: its entries must be True or False")
    return chosen.to(device)


def like(action: Tensor, obs: Any, config: WorldModelConfig) -> Tensor | np.ndarray:
    """A copy of `action` `[B, A]`: a tensor if `obs` is one, else an array; without B if `obs` has none."""
    action = action.clone()  # what users write to it stays with them
    if np.ndim(obs) == len(config.obs_shape):
        action = action[0]
    return action if isinstance(obs, Tensor) else action.cpu().numpy()


def _numbers(given: object, what: str, error: type[TDMPC2Error]) -> Tensor:
    """A tensor of real numbers or bools; `error` where `given` is none."""
    if isinstance(given, Tensor):
        x = given.detach()
        if x.layout != torch.strided or x.is_complex() or x.is_quantized or x.is_meta:
            raise error(f"{what} is a tensor of {x.dtype}, {x.layout}, on {x.device}: pass real numbers")
        return x
    try:
        array = np.asarray(given)
        if array.dtype.kind not in "biuf":
            raise TypeError(f"dtype {array.dtype}")
        # A copy in the machine's byte order, every stride positive: PyTorch takes nothing else.
        return torch.from_numpy(array.astype(array.dtype.newbyteorder("="), order="C"))
    except Exception as e:  # whatever an object raises that is asked for its array
        reason = (str(e).splitlines() or [""])[0][:80]
        raise error(f"{what} of type {type(given).__name__} is no array of numbers ({reason})") from e
