"""Discrete regression: a scalar as a distribution over `num_bins` bins, spaced evenly in symlog units.

Example with bins at symlog -1, 0, 1: a scalar with symlog 0.25 has the two-hot vector (0, 0.75, 0.25). The
inverse is symexp(0 * 0.75 + 1 * 0.25).
"""

import torch
from torch import Tensor

from ..config import WorldModelConfig


def symlog(x: Tensor) -> Tensor:
    return torch.sign(x) * torch.log1p(x.abs())


def symexp(x: Tensor) -> Tensor:
    return torch.sign(x) * torch.expm1(x.abs())


def support(config: WorldModelConfig) -> tuple[float, float]:
    """The least and the greatest scalar that the bins can represent."""
    low, high = symexp(torch.tensor([config.vmin, config.vmax], dtype=torch.float64)).tolist()
    return low, high


def two_hot(x: Tensor, config: WorldModelConfig) -> Tensor:
    """Distributions `[..., num_bins]` of scalars `[...]`; values outside the support are clamped."""
    width = (config.vmax - config.vmin) / (config.num_bins - 1)
    position = (symlog(x).clamp(config.vmin, config.vmax) - config.vmin) / width
    low = position.floor().clamp(max=config.num_bins - 2)
    high_weight = (position - low).unsqueeze(-1)
    index = low.long().unsqueeze(-1)
    out = torch.zeros(*x.shape, config.num_bins, dtype=x.dtype, device=x.device)
    return out.scatter(-1, index, 1 - high_weight).scatter(-1, index + 1, high_weight)


def two_hot_inv(logits: Tensor, config: WorldModelConfig) -> Tensor:
    """Scalars `[...]` from logits `[..., num_bins]`."""
    bins = torch.linspace(config.vmin, config.vmax, config.num_bins, device=logits.device, dtype=logits.dtype)
    return symexp((logits.softmax(-1) * bins).sum(-1))


def soft_cross_entropy(logits: Tensor, target: Tensor, config: WorldModelConfig) -> Tensor:
    """Cross-entropy `[...]` of logits `[..., num_bins]` against scalar targets `[...]`."""
    return -(two_hot(target, config) * logits.log_softmax(-1)).sum(-1)
