"""The TD-MPC2 world model: encoder, latent dynamics, reward, termination, policy prior and Q heads.

All functions accept any leading batch axes; scalars have no trailing axis. Multi-task models take `task`, a
LongTensor that broadcasts against the batch axes; single-task models take None.
"""

import math
from copy import deepcopy
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import WorldModelConfig
from .layers import SimNorm, mlp, pixel_encoder
from .two_hot import two_hot_inv

EMBEDDING_MAX_NORM = 1.0


class PolicyOutput(NamedTuple):
    """Output of the policy prior for a batch of latents."""

    action: Tensor  # [..., A], squashed sample (the mean if no noise was given)
    mean: Tensor  # [..., A], squashed
    log_std: Tensor  # [..., A], before squashing
    entropy: Tensor  # [...]
    scaled_entropy: Tensor  # [...], entropy scaled by the number of action dimensions


class WorldModel(nn.Module):
    """TD-MPC2's implicit world model (paper, section 3.1) with the architecture `config`."""

    action_masks: Tensor

    def __init__(self, config: WorldModelConfig):
        super().__init__()
        self.config = c = config
        if c.num_tasks:
            self.task_emb = nn.Parameter(torch.empty(c.num_tasks, c.task_dim).uniform_(-0.02, 0.02))
            # Not a weight, so no checkpoint has it: computed also for a model on the meta device.
            masks = torch.zeros(c.num_tasks, c.action_dim, dtype=torch.float32, device="cpu")
            for i, dim in enumerate(c.action_dims):
                masks[i, :dim] = 1.0
            self.register_buffer("action_masks", masks, persistent=False)
        za_dim = c.latent_dim + c.action_dim + c.task_dim
        hidden = [c.mlp_dim, c.mlp_dim]
        simnorm = SimNorm(c.simnorm_dim)
        if c.pixels:
            self.encoder = pixel_encoder(c.obs_shape[0], c.num_channels, simnorm)
        else:
            widths = [c.enc_dim] * max(c.num_enc_layers - 1, 1)
            self.encoder = mlp(c.obs_shape[0] + c.task_dim, widths, c.latent_dim, last=simnorm)
        self.dynamics = mlp(za_dim, hidden, c.latent_dim, last=simnorm)
        self.reward_head = mlp(za_dim, hidden, c.num_bins)
        if c.episodic:
            self.termination_head = mlp(c.latent_dim + c.task_dim, hidden, 1)
        self.policy = mlp(c.latent_dim + c.task_dim, hidden, 2 * c.action_dim)
        self.q = mlp(za_dim, hidden, c.num_bins, heads=c.num_q, dropout=c.dropout)
        for head in (self.reward_head, self.q):
            nn.init.zeros_(head[-1].weight)  # type: ignore[arg-type]
        self.target_q = deepcopy(self.q).requires_grad_(False)

    def train(self, mode: bool = True) -> "WorldModel":
        """Set training mode, with dropout; the target heads never have dropout."""
        super().train(mode)
        self.target_q.train(False)
        return self

    def encode(self, obs: Tensor, task: Tensor | None = None) -> Tensor:
        """Observations `[..., obs_dim]` or uint8 `[..., C, 64, 64]` to latents `[..., L]`."""
        if not self.config.pixels:
            return self.encoder(self._with_task(obs, task))
        pixels = obs.flatten(0, -4).float() / 255.0 - 0.5
        return self.encoder(pixels).unflatten(0, obs.shape[:-3])

    def next(self, z: Tensor, action: Tensor, task: Tensor | None = None) -> Tensor:
        """Latent dynamics: the latent `[..., L]` after `action` `[..., A]`."""
        return self.dynamics(torch.cat([self._with_task(z, task), action], -1))

    def reward_logits(self, z: Tensor, action: Tensor, task: Tensor | None = None) -> Tensor:
        """Logits `[..., num_bins]` of the reward for `action` in `z`."""
        return self.reward_head(torch.cat([self._with_task(z, task), action], -1))

    def reward(self, z: Tensor, action: Tensor, task: Tensor | None = None) -> Tensor:
        """Expected reward `[...]` of one agent step."""
        return two_hot_inv(self.reward_logits(z, action, task), self.config)

    def termination_logits(self, z: Tensor, task: Tensor | None = None) -> Tensor:
        """Logits `[...]` that the episode has ended in `z`; episodic models only."""
        return self.termination_head(self._with_task(z, task)).squeeze(-1)

    def termination(self, z: Tensor, task: Tensor | None = None) -> Tensor:
        """Probability `[...]` that the episode has ended in `z`."""
        return self.termination_logits(z, task).sigmoid()

    def value_logits(
        self,
        z: Tensor,
        action: Tensor,
        task: Tensor | None = None,
        *,
        target: bool = False,
        detach: bool = False,
        heads: Tensor | None = None,
    ) -> Tensor:
        """Logits `[heads, ..., num_bins]` of the Q heads with indices `heads`; None: all.

        `detach` stops gradients to the heads' parameters, not to `z` and `action`.
        """
        x = torch.cat([self._with_task(z, task), action], -1)
        q = self.target_q if target else self.q
        flat = x.flatten(0, -2) if x.dim() > 1 else x[None]
        if detach or heads is not None:
            params = {name: p.detach() if detach else p for name, p in q.named_parameters()}
            if heads is not None:
                params = {name: p[heads] for name, p in params.items()}
            out = torch.func.functional_call(q, params, (flat,))
        else:
            out = q(flat)
        return out.unflatten(1, x.shape[:-1]) if x.dim() > 1 else out[:, 0]

    def value(
        self,
        z: Tensor,
        action: Tensor,
        task: Tensor | None = None,
        *,
        target: bool = False,
        heads: Tensor | None = None,
    ) -> Tensor:
        """Q values `[heads, ...]` in units of discounted return."""
        logits = self.value_logits(z, action, task, target=target, heads=heads)
        return two_hot_inv(logits, self.config)

    def pi(self, z: Tensor, task: Tensor | None = None, noise: Tensor | None = None) -> PolicyOutput:
        """Policy prior: a squashed Gaussian; `noise` `[..., A]` is standard normal, None: the mean."""
        c = self.config
        mean, log_std = self.policy(self._with_task(z, task)).chunk(2, -1)
        log_std = c.log_std_min + 0.5 * (c.log_std_max - c.log_std_min) * (log_std.tanh() + 1)
        eps = torch.zeros_like(mean) if noise is None else noise
        dims: Tensor | float = float(c.action_dim)
        if c.num_tasks:
            mask = self.action_masks[task]
            mean, log_std, eps = mean * mask, log_std * mask, eps * mask
            dims = mask.sum(-1)
        gaussian = (-0.5 * eps.square() - log_std - 0.5 * math.log(2 * math.pi)).sum(-1)
        action = (mean + eps * log_std.exp()).tanh()
        log_prob = gaussian - (F.relu(1 - action.square()) + 1e-6).log().sum(-1)
        # The published scale of the entropy bonus: the Gaussian's log-probability times the number of action
        # dimensions, divided by the squashed log-probability.
        scaled_entropy = -log_prob * (gaussian * dims / (log_prob + 1e-8))
        return PolicyOutput(action, mean.tanh(), log_std, -log_prob, scaled_entropy)

    def prior(self, z: Tensor, task: Tensor | None = None) -> Tensor:
        """The mean action `[..., A]` of the policy prior: `pi(z, task).mean` alone."""
        mean = self.policy(self._with_task(z, task))[..., : self.config.action_dim]
        return (mean * self.action_masks[task] if self.config.num_tasks else mean).tanh()

    def task_embedding(self, task: Tensor) -> Tensor:
        """Embeddings `[..., task_dim]` of tasks `[...]` with norm at most 1; multi-task models only."""
        emb = self.task_emb[task]
        norm = emb.detach().norm(dim=-1, keepdim=True)
        return emb * torch.where(norm > EMBEDDING_MAX_NORM, EMBEDDING_MAX_NORM / (norm + 1e-7), 1.0)

    def _with_task(self, x: Tensor, task: Tensor | None) -> Tensor:
        """Append the task embedding to the last axis of `x`."""
        if not self.config.num_tasks:
            return x
        if task is None:
            raise ValueError("a multi-task world model needs the task's index, `task`")
        return torch.cat([x, self.task_embedding(task).expand(*x.shape[:-1], -1)], -1)
