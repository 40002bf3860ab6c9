"""The world model in the planner: values of batches of action sequences.

`FastModel` computes the same as `WorldModel` with less work. It evaluates only the two sampled Q heads. All
samples start at the same latent, so its share of the first layer is computed once. All operations between two
matrix products are float32 and compile to one loop; bfloat16 rounds only the products' inputs and outputs.

Even this rounding error is larger than the differences between elites. So with bfloat16 one sequence, the
distribution's mean, is computed in float32. For all others only the difference to it is rounded, layer by
layer: `W x = W c + W (x - c)`. The error shrinks as the samples come closer to the mean.

Tensors have shape `[h, B, N, features]`: stacked networks, latents, samples per latent.
"""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..config import WorldModelConfig
from ..world_model.layers import mish
from ..world_model.model import WorldModel
from ..world_model.two_hot import symexp
from .weights import Layer, Layers, Weights, for_tasks, transposed

LAYER_NORM_EPS = 1e-5  # PyTorch's default
Linear = Callable[[Tensor, Layer], Tensor]  # `[h or 1, B, N, in]` to float32 `[h, B, N, out]`


class Origin(NamedTuple):
    """The start of plans."""

    z: Tensor  # [B, L], transposed (see weights.py)
    task: Tensor  # [B, task_dim], embeddings; task_dim = 0 without tasks
    mask: Tensor  # [B, A], zero where an action is padding


class Rollout(NamedTuple):
    """The state of predicted action sequences."""

    total: Tensor | float  # [B, N], discounted reward so far
    discount: Tensor | float  # [B, N], of later rewards; zero if the episode has ended
    z: Tensor  # [B, N, L], the last latent, transposed


def origin(model: WorldModel, z: Tensor, task: Tensor | None = None) -> Origin:
    """The start for `FastModel.score`, from latents `[B, L]` and tasks `[B]` of a multi-task model."""
    latent = transposed(z, model.config.simnorm_dim)
    if task is None:
        return Origin(latent, z[:, :0], z.new_ones(z.shape[0], model.config.action_dim))
    return Origin(latent, model.task_embedding(task), model.action_masks[task])


class FastModel(nn.Module):
    """A world model for planning.

    Args:
        config: of the world model.
        discount: per agent step.
        dtype: of matrix products.
    """

    def __init__(self, config: WorldModelConfig, discount: float, dtype: torch.dtype):
        super().__init__()
        self.config, self.discount, self.dtype = config, discount, dtype

    def score(
        self, at: Origin, actions: Tensor, centre: Tensor, noise: Tensor, heads: Tensor, w: Weights
    ) -> Tensor:
        """Predicted returns `[B, N]` of action sequences (paper, eq. 6).

        The value at the horizon is the mean of two Q heads. In an episodic model nothing counts after the
        first latent predicted terminal.

        Args:
            at: the start, from `origin`.
            actions: `[B, H, N, A]`.
            centre: `[B, H, 1, A]`, the mean of the samples; precision is highest near it.
            noise: `[B, N, A]`, standard normal, for the prior's action at the horizon.
            heads: `[2]`, indices of Q heads.
            w: from `FollowedWeights`.
        """
        w = for_tasks(w, at.task)
        # With two heads the choice is always the same; their order does not matter.
        w = w if self.config.num_q == 2 else w._replace(q=select(w.q, heads))
        if self.dtype == torch.float32:
            return self._value(at, actions, noise, w, linear)
        trace: list[tuple[Tensor, Tensor]] = []
        self._value(at, centre, torch.zeros_like(noise[:, :1]), w, partial(traced, trace))
        return self._value(at, actions, noise, w, partial(around, iter(trace)))

    def _value(self, at: Origin, actions: Tensor, noise: Tensor, w: Weights, linear: Linear) -> Tensor:
        first, latent_dim = w.hidden[0], self.config.latent_dim
        # The first latent is the same for all samples: its share of the first layer joins the bias.
        latent_share = linear(at.z[None, :, None], first.of_inputs(slice(0, latent_dim)))
        first_of_all = first.of_inputs(slice(latent_dim, None))._replace(bias=latent_share)
        end = Rollout(0.0, 1.0, at.z)
        for t, action in enumerate(actions.unbind(1)):
            if t == 0:
                x = linear(action[None], first_of_all)
            else:
                x = linear(self._join(end.z, action), first)
            end = self._step(end, x, w, linear)
        x = self._join(end.z, self._pi(end.z, noise, at.mask, w, linear))
        return end.total + end.discount * two_hot_mean(mlp(x, w.q, linear), w.bins).mean(0)

    def _join(self, z: Tensor, action: Tensor) -> Tensor:
        """Inputs `[1, B, N, L + A]` of networks that read latent and action."""
        return torch.cat([z, action], -1)[None]

    def _step(self, at: Rollout, x: Tensor, w: Weights, linear: Linear) -> Rollout:
        """One step further; `x` `[2, B, N, mlp_dim]` are the outputs of the first layers."""
        for layer, following in pairwise(w.hidden):
            x = linear(activate(x, layer), following)
        # Activated one by one: the compiler would make a second loop for a slice of an activated tensor.
        for_reward, for_dynamics = (activate(x[i : i + 1], w.hidden[-1].one(i)) for i in range(2))
        reward = two_hot_mean(linear(for_reward, w.reward)[0], w.bins)
        logits = norm(linear(for_dynamics, w.dynamics), w.dynamics)[0]
        z = logits.unflatten(-1, (self.config.simnorm_dim, -1)).softmax(-2).flatten(-2)
        discount = at.discount * self.discount
        if self.config.episodic:  # nothing counts after the first latent predicted terminal
            discount = discount * (mlp(z[None], w.termination, linear)[0, ..., 0] <= 0).float()
        return Rollout(at.total + at.discount * reward, discount, z)

    def _pi(self, z: Tensor, noise: Tensor, mask: Tensor, w: Weights, linear: Linear) -> Tensor:
        """The policy prior's actions `[B, N, A]` in `z` `[B, N, L]`."""
        low, high = self.config.log_std_min, self.config.log_std_max
        mean, log_std = mlp(z[None], w.policy, linear)[0].chunk(2, -1)
        log_std = low + 0.5 * (high - low) * (log_std.tanh() + 1)
        return (mean + noise * log_std.exp()).tanh() * mask[:, None]


def linear(x: Tensor, layer: Layer) -> Tensor:
    """A linear layer with float32 weights."""
    return product(x, layer.weight) + layer.bias


def traced(trace: list[tuple[Tensor, Tensor]], x: Tensor, layer: Layer) -> Tensor:
    """A linear layer in float32; appends input and output to the trace."""
    y = linear(x, layer._replace(weight=layer.weight.float()))
    trace.append((x, y))
    return y


def around(trace: Iterator[tuple[Tensor, Tensor]], x: Tensor, layer: Layer) -> Tensor:
    """A linear layer: the next output of the trace, plus the rounded product of `x` minus its input."""
    x_c, y_c = next(trace)
    return product((x - x_c).to(layer.weight.dtype), layer.weight).float() + y_c


def product(x: Tensor, weight: Tensor) -> Tensor:
    """`[h or 1, B, N, in]` times `[h, in, out]`: `[h, B, N, out]`."""
    rows = x.expand(weight.shape[0], -1, -1, -1).flatten(1, 2)
    return torch.bmm(rows, weight).unflatten(1, x.shape[1:3])


def norm(x: Tensor, layer: Layer) -> Tensor:
    """LayerNorm over the last axis, whose mean is already zero (see weights.py)."""
    x = x * (x.square().mean(-1, keepdim=True) + LAYER_NORM_EPS).rsqrt()
    return x * layer.scale + layer.shift  # type: ignore[operator]  # normed layers have both


def activate(x: Tensor, layer: Layer) -> Tensor:
    """LayerNorm and Mish."""
    return mish(norm(x, layer))


def mlp(x: Tensor, layers: Layers, linear: Linear) -> Tensor:
    """`[h or 1, B, N, in]` to float32 `[h, B, N, out]`."""
    for layer in layers[:-1]:
        x = activate(linear(x, layer), layer)
    return linear(x, layers[-1])


def select(layers: Layers, heads: Tensor) -> Layers:
    """The stacked layers with indices `heads`."""
    return tuple(layer.each(lambda x: x[heads]) for layer in layers)


def two_hot_mean(logits: Tensor, bins: Tensor) -> Tensor:
    """The scalars `[...]` that logits `[..., num_bins]` encode."""
    p = (logits - logits.amax(-1, keepdim=True)).exp()
    return symexp((p * bins).sum(-1) / p.sum(-1))
