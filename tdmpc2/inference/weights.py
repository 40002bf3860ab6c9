"""The weights for planning, copied from a world model in the fastest layout.

Networks with the same input (reward and dynamics; the Q heads) are stacked on a leading axis `h`, so one
batched matrix product evaluates them. The weights of normed layers are shifted to give outputs of mean zero:
the norm need not compute the mean.

Latents are transposed: the entries of one simplex lie `L / simnorm_dim` apart instead of side by side, so
SimNorm works on long vectors. With simplices of two, (a0 a1 b0 b1 c0 c1) becomes (a0 b0 c0 a1 b1 c1). The
weights of all layers that write or read a latent are permuted to match.
"""

from collections.abc import Callable, Iterable, Sequence
from operator import attrgetter
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from ..world_model.layers import NormedLinear
from ..world_model.model import WorldModel


class Layer(NamedTuple):
    """`h` stacked linear layers, each with the affine map of the LayerNorm after it, if any."""

    weight: Tensor  # [h, in, out], in the planning precision, stored along the inputs
    bias: Tensor  # [h, 1, 1, out], float32 like all below; [h, B, 1, out] after `for_tasks`
    scale: Tensor | None = None  # [h, 1, 1, out]
    shift: Tensor | None = None  # [h, 1, 1, out]
    task: Tensor | None = None  # [h, task_dim, out], a first layer's weights for the task embedding

    def each(self, change: Callable[[Tensor], Tensor]) -> "Layer":
        """`change` applied to every tensor."""
        return Layer(*(None if x is None else change(x) for x in self))  # type: ignore[arg-type]

    def of_inputs(self, some: slice) -> "Layer":
        """The layers on a slice of their inputs."""
        return self._replace(weight=self.weight[:, some])

    def one(self, i: int) -> "Layer":
        """Layer `i` alone."""
        return self.each(lambda x: x[i : i + 1])


Layers = tuple[Layer, ...]


class Weights(NamedTuple):
    """The weights of a world model for planning."""

    hidden: Layers  # of reward and dynamics, h = 2
    reward: Layer
    dynamics: Layer
    policy: Layers
    q: Layers  # h = num_q
    termination: Layers  # empty unless the model is episodic
    bins: Tensor  # [num_bins], symlog units


class FollowedWeights:
    """The weights of `model`, matrices in `dtype`; copied again if they have changed."""

    def __init__(self, model: WorldModel, dtype: torch.dtype):
        self.model, self.dtype = model, dtype
        self._copy: Weights | None = None
        self._version: list[tuple[int, int]] = []

    def __call__(self) -> Weights:
        """The current weights."""
        parameters = list(self.model.parameters())
        tracked = not any(p.is_inference() for p in parameters)  # inference tensors have no version
        version = [(p.data_ptr(), p._version) for p in parameters] if tracked else []
        if self._copy is None or not tracked or version != self._version:
            self._copy, self._version = copy_weights(self.model, self.dtype), version
        return self._copy


def copy_weights(model: WorldModel, dtype: torch.dtype) -> Weights:
    """The weights of `model`, matrices in `dtype`."""
    c = model.config
    device = next(model.parameters()).device
    order = transposed(torch.arange(c.latent_dim, device=device), c.simnorm_dim)

    def networks(*stacked: Iterable[nn.Module]) -> Layers:
        """The stacked layers of networks that read latents."""
        first, *others = (side_by_side(layers) for layers in zip(*stacked, strict=True))
        task_end = c.latent_dim + c.task_dim
        first = first._replace(
            weight=torch.cat([first.weight[:, order], first.weight[:, task_end:]], 1),
            task=first.weight[:, c.latent_dim : task_end].clone(),
        )
        return tuple(ready(layer) for layer in [first, *others])

    def ready(layer: Layer) -> Layer:
        layer = layer if layer.scale is None else centred(layer)
        return layer._replace(weight=layer.weight.mT.to(dtype).contiguous().mT)

    return Weights(
        hidden=networks([*model.reward_head][:-1], [*model.dynamics][:-1]),
        reward=ready(side_by_side([model.reward_head[-1]])),
        dynamics=ready(side_by_side([model.dynamics[-1]]).each(lambda x: x[..., order])),
        policy=networks(model.policy),
        q=networks(model.q),
        termination=networks(model.termination_head) if c.episodic else (),
        bins=torch.linspace(c.vmin, c.vmax, c.num_bins, dtype=torch.float32, device=device),
    )


def for_tasks(w: Weights, embedding: Tensor) -> Weights:
    """Weights for latents `[B, ...]` of tasks with embeddings `[B, task_dim]`.

    An embedding is the same for all samples, so its share of a first layer joins the bias.
    """
    if embedding.shape[1] == 0:
        return w

    def biased(layers: Layers) -> Layers:
        share = (embedding @ cast(Tensor, layers[0].task))[:, :, None]  # [h, B, 1, out]
        return layers[0]._replace(bias=layers[0].bias + share), *layers[1:]

    return w._replace(
        hidden=biased(w.hidden),
        policy=biased(w.policy),
        q=biased(w.q),
        termination=biased(w.termination) if w.termination else (),
    )


def side_by_side(layers: Sequence[nn.Module]) -> Layer:
    """Layers of one shape, stacked; a single layer with heads counts as several layers."""

    def stack(name: str) -> Tensor:
        tensors = [attrgetter(name)(layer).detach() for layer in layers]
        return tensors[0].clone() if has_heads else torch.stack(tensors)

    has_heads = cast(Tensor, layers[0].weight).dim() == 3
    weight, bias = stack("weight").mT, stack("bias")[:, None, None]
    if not isinstance(layers[0], NormedLinear):
        return Layer(weight, bias)
    return Layer(weight, bias, stack("ln.weight")[:, None, None], stack("ln.bias")[:, None, None])


def centred(layer: Layer) -> Layer:
    """`layer` with the mean removed from its outputs; the LayerNorm after it removes it anyway."""

    def off(x: Tensor) -> Tensor:
        return x - x.mean(-1, keepdim=True)

    task = None if layer.task is None else off(layer.task)
    return layer._replace(weight=off(layer.weight), bias=off(layer.bias), task=task)


def transposed(z: Tensor, simnorm_dim: int) -> Tensor:
    """Latents `[..., L]` in the transposed layout."""
    return z.unflatten(-1, (-1, simnorm_dim)).transpose(-1, -2).flatten(-2)
