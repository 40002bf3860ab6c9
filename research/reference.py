"""The plain planner and the plain update: straight from the paper, written for clarity and in no hurry.

Eager, float32, one latent, one step after another, every Q head evaluated even where two are used. The plan
asks the model's own functions, which have the heads in one product; the update takes the heads apart.
The benchmarks measure how much faster the package is than this, and the tests take it for an oracle. Both
ask for their noise in the same order as the package does.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tdmpc2 import WorldModel
from tdmpc2.config import PlannerConfig, UpdateConfig
from tdmpc2.planner import NoiseSource
from tdmpc2.training.update import Batch, Noise
from tdmpc2.world_model import soft_cross_entropy, two_hot_inv
from tdmpc2.world_model.layers import Linear, NormedLinear


class ReferencePlan(NamedTuple):
    actions: Tensor  # [H, A]
    mean: Tensor  # [H, A]
    std: Tensor  # [H, A]
    value: Tensor  # [], predicted return of `actions`


@torch.no_grad()
def reference_plan(
    model: WorldModel,
    config: PlannerConfig,
    discount: float,
    noise: NoiseSource,
    z: Tensor,
    mean: Tensor | None = None,
    task: Tensor | None = None,
) -> ReferencePlan:
    """Plan from one latent `[L]`, the distribution's mean starting at `mean` `[H, A]` or zero.

    `task` `[]` is the index of a multi-task model's task.
    """
    c, action_dim = config, model.config.action_dim
    mask = torch.ones(action_dim) if task is None else model.action_masks[task]
    mean = torch.zeros(c.horizon, action_dim) if mean is None else mean
    std = torch.full((c.horizon, action_dim), c.max_std)
    actions = torch.zeros(c.horizon, c.num_samples, action_dim)

    eps = noise.normal(c.horizon, c.num_pi_trajs, action_dim)
    z_pi = z.repeat(c.num_pi_trajs, 1)
    for t in range(c.horizon):
        actions[t, : c.num_pi_trajs] = model.pi(z_pi, task, eps[t]).action
        z_pi = model.next(z_pi, actions[t, : c.num_pi_trajs], task)

    for _ in range(c.iterations):
        eps = noise.normal(c.horizon, c.num_samples - c.num_pi_trajs, action_dim)
        actions[:, c.num_pi_trajs :] = (mean[:, None] + std[:, None] * eps).clamp(-1, 1)
        actions = actions * mask
        value = _estimate_value(model, discount, noise, z.repeat(c.num_samples, 1), actions, task)
        elite = value.nan_to_num(0.0).topk(c.num_elites)
        elite_actions = actions[:, elite.indices]  # [H, num_elites, A]
        score = (c.temperature * (elite.values - elite.values.max())).exp()
        score = score / score.sum()
        weight = score[None, :, None] / (score.sum() + 1e-9)
        mean = (weight * elite_actions).sum(1)
        std = (weight * (elite_actions - mean[:, None]) ** 2).sum(1).sqrt()
        std = std.clamp(c.min_std, c.max_std) * mask

    drawn = (score.log() + noise.gumbel(c.num_elites)).argmax()
    return ReferencePlan(elite_actions[:, drawn].clamp(-1, 1), mean, std, elite.values[drawn])


def _estimate_value(
    model: WorldModel,
    discount: float,
    noise: NoiseSource,
    z: Tensor,
    actions: Tensor,
    task: Tensor | None,
) -> Tensor:
    """Predicted return `[N]` of `actions` `[H, N, A]` from `z` `[N, L]` (paper, eq. 6)."""
    total, factor = torch.zeros(z.shape[0]), torch.ones(z.shape[0])
    for action in actions:
        total = total + factor * model.reward(z, action, task)
        z = model.next(z, action, task)
        factor = factor * discount
        if model.config.episodic:
            factor = factor * (model.termination(z, task) <= 0.5)
    action = model.pi(z, task, noise.normal(*actions.shape[1:])).action
    all_heads = model.value(z, action, task)  # [num_q, N]
    return total + factor * all_heads[noise.two_heads(model.config.num_q)].mean(0)


class ReferenceUpdate:
    """One gradient step on the world model and one on the policy prior (paper, sections 3.1 and 3.2).

    Args:
        model: single-task, of states, without termination; trained in place, but for its Q heads.
        config: coefficients, learning rates and the like.
        discount: per agent step.
        noise: of the policy's samples and of the choice of Q heads.

    Attributes:
        q: the Q heads, taken apart; these are trained.
        target_q: their slow copies.
    """

    def __init__(self, model: WorldModel, config: UpdateConfig, discount: float, noise: Noise):
        self.model, self.config, self.discount, self.noise = model, config, discount, noise
        model.requires_grad_(True)
        self.q = [head(model.q, i) for i in range(model.config.num_q)]
        self.target_q = [head(model.target_q, i).eval() for i in range(model.config.num_q)]
        encoder = list(model.encoder.parameters())
        others = [*model.dynamics.parameters(), *model.reward_head.parameters()]
        others += [p for q in self.q for p in q.parameters()]
        self.model_params, self.policy_params = encoder + others, list(model.policy.parameters())
        groups: list[dict[str, Any]] = [
            {"params": encoder, "lr": config.lr * config.enc_lr_scale},
            {"params": others},
        ]
        self.model_optim = torch.optim.Adam(groups, lr=config.lr)
        self.policy_optim = torch.optim.Adam(self.policy_params, lr=config.lr, eps=1e-5)
        self.q_scale = torch.ones(())

    def __call__(self, batch: Batch, *, dropout: bool = True) -> dict[str, Tensor]:
        """Take one step on `batch`; returns the losses and the norms of their gradients."""
        model, c, horizon = self.model, self.config, len(batch.action)
        for q in self.q:
            q.train(dropout)

        with torch.no_grad():
            next_z, target = [], []
            noise = self.noise.normal(*batch.action.shape)
            two = self.noise.two_heads(model.config.num_q)
            for t in range(horizon):
                z = model.encode(batch.obs[t + 1])
                value = self._values(self.target_q, z, model.pi(z, noise=noise[t]).action)
                value = value[two].min(0).values
                next_z.append(z)
                target.append(batch.reward[t] + self.discount * (1 - batch.terminated[t]) * value)

        zs = [model.encode(batch.obs[0])]
        consistency = reward = value = torch.zeros(())
        for t in range(horizon):
            action, rho = batch.action[t], c.rho**t
            x = torch.cat([zs[t], action], -1)
            logits = model.reward_logits(zs[t], action)
            reward = reward + rho * soft_cross_entropy(logits, batch.reward[t], model.config).mean() / horizon
            for q in self.q:
                loss = soft_cross_entropy(q(x), target[t], model.config).mean()
                value = value + rho * loss / (horizon * len(self.q))
            zs.append(model.next(zs[t], action))
            consistency = consistency + rho * F.mse_loss(zs[t + 1], next_z[t]) / horizon
        total = c.consistency_coef * consistency + c.reward_coef * reward + c.value_coef * value
        self.model_optim.zero_grad()
        total.backward()
        grad_norm = nn.utils.clip_grad_norm_(self.model_params, c.grad_clip_norm)
        self.model_optim.step()

        noise = self.noise.normal(horizon + 1, *batch.action.shape[1:])
        two = self.noise.two_heads(model.config.num_q)
        for q in self.q:
            q.requires_grad_(False)
        pi_loss = torch.zeros(())
        for t in range(horizon + 1):
            z = zs[t].detach()
            pi = model.pi(z, noise=noise[t])
            gain = self._values(self.q, z, pi.action)[two].mean(0)
            if t == 0:
                low, high = gain.detach().quantile(torch.tensor([0.05, 0.95]))
                self.q_scale.lerp_((high - low).clamp(min=1.0), c.tau)
            gain = gain / self.q_scale + c.entropy_coef * pi.scaled_entropy
            pi_loss = pi_loss - c.rho**t * gain.mean() / (horizon + 1)
        self.policy_optim.zero_grad()
        pi_loss.backward()
        pi_grad_norm = nn.utils.clip_grad_norm_(self.policy_params, c.grad_clip_norm)
        self.policy_optim.step()
        for q in self.q:
            q.requires_grad_(True)

        with torch.no_grad():
            for q, slow in zip(self.q, self.target_q, strict=True):
                for p, p_slow in zip(q.parameters(), slow.parameters(), strict=True):
                    p_slow.lerp_(p, c.tau)
        return {
            "consistency_loss": consistency.detach(),
            "reward_loss": reward.detach(),
            "value_loss": value.detach(),
            "total_loss": total.detach(),
            "grad_norm": grad_norm,
            "pi_loss": pi_loss.detach(),
            "pi_grad_norm": pi_grad_norm,
        }

    def _values(self, heads: list[nn.Sequential], z: Tensor, action: Tensor) -> Tensor:
        """Q values `[num_q, B]` of actions `[B, A]` in latents `[B, L]`."""
        x = torch.cat([z, action], -1)
        return torch.stack([two_hot_inv(q(x), self.model.config) for q in heads])


def head(stacked: nn.Sequential, i: int) -> nn.Sequential:
    """Head `i` of stacked ones, as plain layers of its own."""
    layers: list[nn.Module] = []
    for layer in stacked:
        assert isinstance(layer, Linear)
        linear = nn.Linear(layer.weight.shape[-1], layer.weight.shape[-2])
        linear.load_state_dict({"weight": layer.weight[i], "bias": layer.bias[i]})
        layers.append(linear)
        if isinstance(layer, NormedLinear):
            layers += [nn.Dropout(layer.dropout)] if layer.dropout else []
            norm = nn.LayerNorm(linear.out_features)
            norm.load_state_dict({"weight": layer.ln.weight[i], "bias": layer.ln.bias[i]})
            layers += [norm, nn.Mish()]
    return nn.Sequential(*layers)
