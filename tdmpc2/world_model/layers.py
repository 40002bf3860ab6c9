"""The layers of the world model: linear layers with an optional axis of heads, Mish, SimNorm.

An MLP has hidden layers (linear, LayerNorm, Mish) and a last layer, which is either linear or (linear,
LayerNorm, SimNorm). With `heads=h` every parameter has a leading axis `h`, and the output `[..., out]`
becomes `[h, ..., out]`: an ensemble is one batched matrix product, not a loop.

`torch.autocast` rounds only the products of hidden layers; norms, activations and linear last layers stay
float32.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Mish(nn.Module):
    """`x tanh(log(1 + e^x))`."""

    def forward(self, x: Tensor) -> Tensor:
        return mish(x)


def mish(x: Tensor) -> Tensor:
    """Mish; compiled, it uses one exponential and one division and is several times faster."""
    if not torch.compiler.is_compiling():
        return F.mish(x)
    e = x.clamp(max=20.0).exp()  # beyond 20, Mish is `x` in float32
    return x - 2 * x / ((1 + e).square() + 1)  # an `e` used twice would be written to memory


@torch.library.custom_op("tdmpc2::dropout_mask", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
def dropout_mask(x: Tensor, p: float) -> Tensor:
    """The factors of dropout for `x`: 0 with probability `p`, else 1 / (1 - p), independently per entry.

    The distances between zeros have a geometric distribution. For small `p` there are few zeros, so sampling
    distances is much faster than sampling every entry.
    """
    enough = int(x.numel() * p + 10 * math.sqrt(x.numel() * p) + 10)  # ten standard deviations above
    zeros = torch.empty(enough, dtype=torch.double, device=x.device).geometric_(p).cumsum(0).long() - 1
    # An extra entry takes all zeros past the end, however many.
    mask = torch.full((x.numel() + 1,), 1 / (1 - p), device=x.device)
    mask[zeros.clamp(max=x.numel())] = 0
    return mask[:-1].view(x.shape)


@dropout_mask.register_fake
def _(x: Tensor, p: float) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


class SimNorm(nn.Module):
    """Softmax over groups of `dim` entries: the latent is a product of simplices (paper, section 3.1)."""

    def __init__(self, dim: int):
        super().__init__()
        self.dim = dim

    def forward(self, x: Tensor) -> Tensor:
        # A softmax over a last axis of size eight is not vectorised; over the second to last it is.
        groups = x.unflatten(-1, (-1, self.dim)).transpose(-1, -2).contiguous()
        return groups.softmax(-2).transpose(-1, -2).flatten(-2)


class LayerNorm(nn.Module):
    """LayerNorm over the last axis with one affine map per head."""

    def __init__(self, dim: int, heads: int | None = None):
        super().__init__()
        lead = () if heads is None else (heads,)
        self.weight = nn.Parameter(torch.ones(*lead, dim))
        self.bias = nn.Parameter(torch.zeros(*lead, dim))

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype != torch.float32:  # a product under autocast is not
            x = x.float()
        if self.weight.dim() == 1:
            return F.layer_norm(x, self.weight.shape, self.weight, self.bias)
        return F.layer_norm(x, x.shape[-1:]) * self.weight[:, None] + self.bias[:, None]


class Linear(nn.Module):
    """`x W^T + b`; with heads `[N, in]` or `[heads, N, in]` becomes `[heads, N, out]`."""

    def __init__(self, in_dim: int, out_dim: int, heads: int | None = None):
        super().__init__()
        lead = () if heads is None else (heads,)
        self.weight = nn.Parameter(torch.empty(*lead, out_dim, in_dim))
        self.bias = nn.Parameter(torch.zeros(*lead, out_dim))
        nn.init.trunc_normal_(self.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        if not torch.is_autocast_enabled(x.device.type):
            return self.product(x)
        with torch.autocast(x.device.type, enabled=False):
            return self.product(x)

    def product(self, x: Tensor) -> Tensor:
        if self.weight.dim() == 2:
            return F.linear(x, self.weight, self.bias)
        x = x.expand(self.weight.shape[0], *x.shape[-2:])
        return torch.baddbmm(self.bias[:, None], x, self.weight.mT)


class NormedLinear(Linear):
    """Linear, dropout (training only), LayerNorm, activation."""

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        activation: nn.Module,
        heads: int | None = None,
        dropout: float = 0.0,
    ):
        super().__init__(in_dim, out_dim, heads)
        self.ln = LayerNorm(out_dim, heads)
        self.activation = activation
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        x = self.product(x)
        if self.training and self.dropout > 0:
            x = x * dropout_mask(x.detach(), self.dropout)
        return self.activation(self.ln(x))


def mlp(
    in_dim: int,
    hidden: Sequence[int],
    out_dim: int,
    *,
    last: nn.Module | None = None,
    heads: int | None = None,
    dropout: float = 0.0,
) -> nn.Sequential:
    """Hidden NormedLinear layers with Mish, then a Linear, or a NormedLinear with the activation `last`.

    Only the first layer has dropout.
    """
    dims = [in_dim, *hidden]
    layers: list[nn.Module] = [
        NormedLinear(a, b, Mish(), heads, dropout if i == 0 else 0.0)
        for i, (a, b) in enumerate(pairwise(dims))
    ]
    layers.append(
        Linear(dims[-1], out_dim, heads) if last is None else NormedLinear(dims[-1], out_dim, last, heads)
    )
    return nn.Sequential(*layers)


def pixel_encoder(channels_in: int, channels: int, last: nn.Module) -> nn.Sequential:
    """Four convolutions on 64x64 images scaled to [-0.5, 0.5]; the latent is 16 x `channels`."""
    return nn.Sequential(
        nn.Conv2d(channels_in, channels, 7, stride=2),
        nn.ReLU(),
        nn.Conv2d(channels, channels, 5, stride=2),
        nn.ReLU(),
        nn.Conv2d(channels, channels, 3, stride=2),
        nn.ReLU(),
        nn.Conv2d(channels, channels, 3, stride=1),
        nn.Flatten(),
        last,
    )
