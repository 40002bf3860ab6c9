"""One TD-MPC2 update: a gradient step on the world model, one on the policy prior, new targets.

Tensors are time first, `[H, B, ...]`, so every head runs once on all steps; only the latent dynamics run step
by step (paper, sections 3.1 and 3.2).

Three functions can be compiled: TD targets, world-model losses, and the Q values of the policy prior.
"""

from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import EAGER, ComputeConfig, UpdateConfig
from ..inference import Compiled, dtype_of
from ..world_model.model import PolicyOutput, WorldModel
from ..world_model.two_hot import soft_cross_entropy, two_hot_inv

SHIFT = 3  # pixels; the augmentation moves an image by at most this

# The values that an update returns, in this order.
INFO = (
    "consistency_loss",
    "reward_loss",
    "value_loss",
    "termination_loss",
    "total_loss",
    "grad_norm",
    "pi_loss",
    "pi_grad_norm",
    "pi_entropy",
    "pi_scaled_entropy",
    "pi_scale",
)


class Batch(NamedTuple):
    """B segments of H steps, with the observation after the last step."""

    obs: Tensor  # [H+1, B, *obs_shape] float32, or uint8 pixels
    action: Tensor  # [H, B, A] in [-1, 1]
    reward: Tensor  # [H, B]
    terminated: Tensor  # [H, B], 1.0 if the step terminated the episode (not the time limit)


class Noise(Protocol):
    """The randomness of an update; `tdmpc2.planner.NoiseSource` provides it."""

    def normal(self, *shape: int) -> Tensor: ...

    def two_heads(self, num_q: int) -> Tensor: ...


class Update:
    """The learner, with the optimisers and the running scale of the Q values.

    Args:
        model: trained in place; in evaluation mode between calls.
        config: coefficients and learning rates.
        discount: per agent step.
        noise: samples the policy's noise and the Q heads. Dropout and pixel augmentation use torch's
            global generator.
        compute: whether to compile, and the precision of products in hidden layers; weights and
            optimisers are always float32.
    """

    def __init__(
        self,
        model: WorldModel,
        config: UpdateConfig,
        discount: float,
        noise: Noise,
        compute: ComputeConfig = EAGER,
    ):
        self.model, self.config, self.discount, self.noise = model, config, discount, noise
        device = next(model.parameters()).device
        self.dtype = dtype_of(compute, device)
        self._targets, self._losses, self._judged = td_targets, world_model_losses, judge_policy
        if compute.compile:
            self._targets, self._losses, self._judged = (
                Compiled(f, what=f"the update's {f.__name__.replace('_', ' ')}", device=device)
                for f in (td_targets, world_model_losses, judge_policy)
            )
        model.requires_grad_(True).target_q.requires_grad_(False)
        self.policy_params = list(model.policy.parameters())
        encoder = list(model.encoder.parameters())
        apart = {id(p) for p in [*encoder, *self.policy_params]}
        others = [p for p in model.parameters() if p.requires_grad and id(p) not in apart]
        self.model_params = encoder + others
        groups: list[dict[str, Any]] = [
            {"params": encoder, "lr": config.lr * config.enc_lr_scale},
            {"params": others},
        ]
        self.model_optim = torch.optim.Adam(groups, lr=config.lr, fused=True)
        self.policy_optim = torch.optim.Adam(self.policy_params, lr=config.lr, eps=1e-5, fused=True)
        self.q_scale = torch.ones((), device=encoder[0].device)
        self.lowest = self.highest = torch.zeros_like(self.q_scale)  # TD targets so far

    def __call__(self, batch: Batch, *, dropout: bool = True) -> dict[str, Tensor]:
        """Take one step on `batch`; `dropout=False` turns the Q heads' dropout off.

        Returns:
            Scalar tensors by the names in INFO, on the model's device.
        """
        model, c = self.model, self.config
        model.train(dropout)
        if model.config.pixels:
            batch = batch._replace(obs=random_shift(batch.obs))

        noise, heads = self.noise.normal(*batch.action.shape), self.noise.two_heads(model.config.num_q)
        with self._autocast():
            next_z, target = self._targets(model, batch, noise, heads, self.discount)
            low, high = target.aminmax()
            self.lowest, self.highest = self.lowest.minimum(low), self.highest.maximum(high)
            losses, zs = self._losses(model, batch, next_z, target, c.rho)
        total = (
            c.consistency_coef * losses["consistency_loss"]
            + c.reward_coef * losses["reward_loss"]
            + c.value_coef * losses["value_loss"]
            + c.termination_coef * losses["termination_loss"]
        )
        grad_norm = self._step(self.model_optim, self.model_params, total)
        policy = self._update_policy(zs.detach())
        with torch.no_grad():
            targets: list[Tensor] = list(model.target_q.parameters())
            sources: list[Tensor] = list(model.q.parameters())
            torch._foreach_lerp_(targets, sources, c.tau)
        model.eval()
        losses |= {"total_loss": total, "grad_norm": grad_norm, **policy}
        return {name: value.detach() for name, value in losses.items()}

    def _update_policy(self, zs: Tensor) -> dict[str, Tensor]:
        """Ascend the Q values and the entropy at the predicted latents `zs` `[H+1, B, L]`."""
        model, c = self.model, self.config
        noise = self.noise.normal(*zs.shape[:-1], model.config.action_dim)
        with self._autocast():
            q, pi = self._judged(model, zs, noise, self.noise.two_heads(model.config.num_q))
        self._update_scale(q[0].detach())
        gain = c.entropy_coef * pi.scaled_entropy + q / self.q_scale
        loss = -(_rho(c.rho, gain) * gain.mean(1)).mean()
        grad_norm = self._step(self.policy_optim, self.policy_params, loss)
        return {
            "pi_loss": loss,
            "pi_grad_norm": grad_norm,
            "pi_entropy": pi.entropy.mean(),
            "pi_scaled_entropy": pi.scaled_entropy.mean(),
            "pi_scale": self.q_scale.clone(),
        }

    def _autocast(self) -> torch.autocast:
        enabled = self.dtype != torch.float32
        # Without the cache: its copies of the weights would become outdated.
        return torch.autocast(self.q_scale.device.type, self.dtype, enabled, cache_enabled=False)

    def _update_scale(self, q: Tensor) -> None:
        """Move the running scale towards the range of `q` `[B]`, 5th to 95th percentile."""
        low, high = q.quantile(q.new_tensor([0.05, 0.95]))
        self.q_scale.lerp_((high - low).clamp(min=1.0), self.config.tau)

    def _step(self, optim: torch.optim.Optimizer, params: list[nn.Parameter], loss: Tensor) -> Tensor:
        """One clipped gradient step; returns the norm of the gradient before clipping."""
        optim.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(params, self.config.grad_clip_norm, foreach=True)
        optim.step()
        # A fused step does not raise the version, which tells the planner to renew its copies.
        torch.autograd.graph.increment_version(params)
        return norm


@torch.no_grad()
def td_targets(
    model: WorldModel, batch: Batch, noise: Tensor, heads: Tensor, discount: float
) -> tuple[Tensor, Tensor]:
    """Latents `[H, B, L]` of the next observations, and TD targets `[H, B]` of the Q heads.

    Args:
        model: the world model.
        batch: recorded segments.
        noise: `[H, B, A]`, standard normal, for the policy's actions.
        heads: `[2]`, indices of Q heads; the smaller value counts.
        discount: per agent step.
    """
    next_z = model.encode(batch.obs[1:])
    action = model.pi(next_z, noise=noise).action
    value = model.value(next_z, action, target=True, heads=heads).amin(0)
    # Divergence must show in the losses, not as an invalid index in two_hot.
    value = value.nan_to_num()
    return next_z, batch.reward + discount * (1 - batch.terminated) * value


def judge_policy(model: WorldModel, zs: Tensor, noise: Tensor, heads: Tensor) -> tuple[Tensor, PolicyOutput]:
    """The mean `[T, B]` of two Q heads for the policy prior's actions in `zs` `[T, B, L]`, and the prior.

    Gradients flow to the policy, not to the Q heads' parameters.
    """
    pi = model.pi(zs, noise=noise)
    logits = model.value_logits(zs, pi.action, detach=True, heads=heads)
    return two_hot_inv(logits, model.config).mean(0), pi


def world_model_losses(
    model: WorldModel, batch: Batch, next_z: Tensor, target: Tensor, rho: float
) -> tuple[dict[str, Tensor], Tensor]:
    """The losses of the world model by name, and the predicted latents `[H+1, B, L]`.

    Args:
        model: the world model.
        batch: recorded segments.
        next_z: `[H, B, L]`, latents of the next observations.
        target: `[H, B]`, TD targets of the Q heads.
        rho: a loss t steps ahead has weight rho^t.
    """
    latents = [model.encode(batch.obs[0])]
    for action in batch.action:
        latents.append(model.next(latents[-1], action))
    zs = torch.stack(latents)
    before, after = zs[:-1], zs[1:]
    weight = _rho(rho, batch.reward) / len(batch.reward)

    reward_logits = model.reward_logits(before, batch.action)
    reward = soft_cross_entropy(reward_logits, batch.reward, model.config)  # [H, B]
    value_logits = model.value_logits(before, batch.action)
    value = soft_cross_entropy(value_logits, target, model.config)  # [num_q, H, B]
    termination = zs.new_zeros(())
    if model.config.episodic:
        logits = model.termination_logits(after)
        termination = F.binary_cross_entropy_with_logits(logits, batch.terminated)
    losses = {
        "consistency_loss": (weight * (after - next_z).square().mean((1, 2))).sum(),
        "reward_loss": (weight * reward.mean(1)).sum(),
        "value_loss": (weight * value.mean((0, 2))).sum(),
        "termination_loss": termination,
    }
    return losses, zs


def random_shift(images: Tensor) -> Tensor:
    """Move each image `[..., C, S, S]` by up to SHIFT pixels in x and y, repeating its border.

    The stacked frames of an image move together.
    """
    flat = images.flatten(0, -4)
    size, device = images.shape[-1], images.device
    shift = torch.randint(-SHIFT, SHIFT + 1, (2, len(flat), 1), device=device)
    rows, columns = (torch.arange(size, device=device) + shift).clamp(0, size - 1)  # [N, S] each
    index = torch.arange(len(flat), device=device)[:, None, None]
    moved = flat[index, :, rows[:, :, None], columns[:, None, :]]  # [N, S, S, C]
    return moved.permute(0, 3, 1, 2).reshape(images.shape)


def _rho(rho: float, like: Tensor) -> Tensor:
    """The weights 1, rho, rho^2, ... `[T]` for the steps of `like` `[T, B]`."""
    return rho ** torch.arange(like.shape[0], device=like.device, dtype=like.dtype)
