"""Checks of an agent's inputs: observations and row masks."""

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
    """Observations `[B, *obs_shape]` on `device`: float32, or uint8 for pixels.

    Args:
        obs: array, tensor or nested sequence of numbers `[B, *obs_shape]`; for one row also `[*obs_shape]`.
        config: gives the shape.
        num_envs: B.
        device: to act on.

    Raises:
        ObservationError: `obs` has another type or shape.
    """
    if isinstance(obs, tuple) and obs and isinstance(obs[-1], dict):
        raise ObservationError(
            "observation is a tuple that ends with a dict, like the result of env.reset() and env.step(): "
            "pass its first entry"
        )
    x = _numbers(obs, "observation", ObservationError)
    shape = config.obs_shape
    if tuple(x.shape) == shape:
        x = x[None]
    if tuple(x.shape) != (num_envs, *shape):
        raise ObservationError(
            f"observation has shape {tuple(x.shape)}; this agent takes {(num_envs, *shape)}: "
            "check that the checkpoint is for this task"
        )
    if config.pixels:
        if x.dtype == torch.uint8:
            return x.to(device)
        if x.is_floating_point() or not ((x.long() >= 0) & (x.long() <= 255)).all():
            raise ObservationError(
                f"observation holds pixels of {x.dtype}: pass uint8, whole numbers from 0 to 255"
            )
        return x.to(device, torch.uint8)
    return x.to(device, torch.float32)


def read_mask(mask: object, num_envs: int, device: torch.device | str) -> Tensor | slice:
    """The rows that a mask selects, as an index.

    Args:
        mask: `[B]` of bools, or of the numbers 0 and 1; for one row also a single number. None: all rows.
        num_envs: B.
        device: of the index.

    Raises:
        ConfigError: `mask` is something else.
    """
    if mask is None:
        return slice(None)
    x = _numbers(mask, "mask", ConfigError).to(torch.float64)
    if num_envs == 1 and x.dim() == 0:
        x = x[None]
    if tuple(x.shape) != (num_envs,):
        raise ConfigError(f"mask has shape {tuple(x.shape)}: it must have one entry per row, ({num_envs},)")
    chosen = x != 0
    if not (chosen == x).all():
        raise ConfigError("mask has entries that are not 0 or 1: use True and False")
    return chosen.to(device)


def like(action: Tensor, obs: Any, config: WorldModelConfig) -> Tensor | np.ndarray:
    """A copy of `action` `[B, A]` in the form of `obs`: a tensor or an array, with or without B."""
    action = action.clone()  # users may write to it
    if np.ndim(obs) == len(config.obs_shape):
        action = action[0]
    return action if isinstance(obs, Tensor) else action.cpu().numpy()


def _numbers(given: object, what: str, error: type[TDMPC2Error]) -> Tensor:
    """A tensor of real numbers or bools; raises `error` if `given` has others."""
    if isinstance(given, Tensor):
        x = given.detach()
        if x.layout != torch.strided or x.is_complex() or x.is_quantized or x.is_meta:
            raise error(f"{what} is a tensor of {x.dtype}, {x.layout}, on {x.device}: pass real numbers")
        return x
    try:
        array = np.asarray(given)
        if array.dtype.kind not in "biuf":
            raise TypeError(f"dtype {array.dtype}")
        # PyTorch needs the machine's byte order and positive strides.
        return torch.from_numpy(array.astype(array.dtype.newbyteorder("="), order="C"))
    except Exception as e:  # `__array__` of any object may raise anything
        reason = (str(e).splitlines() or [""])[0][:80]
        raise error(f"{what} of type {type(given).__name__} is not an array of numbers ({reason})") from e
