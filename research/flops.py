"""How many floating-point operations a plan and an update require, by formula from the architecture.

Counted are matrix products alone, two operations for every multiplication with its addition. Normalisation,
activations, two-hot means and refitting are not counted: the time that they take is overhead.

A plan is counted as the algorithm is published, every iteration evaluating every sample over the whole
horizon, with two exceptions that make it smaller. Of the Q heads two are counted, for two are used. And
all samples of a latent start there, so what the first layers of reward and dynamics make of that latent
is counted once for each iteration instead of once for each sample.
"""

from itertools import pairwise

from tdmpc2.config import PlannerConfig, WorldModelConfig


def plan_flops(model: WorldModelConfig, planner: PlannerConfig, batch: int) -> int:
    """Operations that plans from `batch` latents require; of a single-task model."""
    m, p = model, planner
    hidden = [m.mlp_dim, m.mlp_dim]
    reward = _products(m.latent_dim + m.action_dim, *hidden, m.num_bins)
    dynamics = _products(m.latent_dim + m.action_dim, *hidden, m.latent_dim)
    termination = _products(m.latent_dim, *hidden, 1) if m.episodic else 0
    policy = _products(m.latent_dim, *hidden, 2 * m.action_dim)
    q_heads = 2 * _products(m.latent_dim + m.action_dim, *hidden, m.num_bins)

    per_sample = p.horizon * (reward + dynamics + termination) + policy + q_heads
    shared = 2 * _products(m.latent_dim, m.mlp_dim)  # of both first layers, at the first step
    iteration = p.num_samples * (per_sample - shared) + shared
    prior = p.num_pi_trajs * (p.horizon * policy + (p.horizon - 1) * dynamics)
    return batch * (p.iterations * iteration + prior)


def update_flops(model: WorldModelConfig, horizon: int, batch: int) -> int:
    """Operations that one update requires, forwards and backwards; of a single-task model of states.

    Backwards a layer takes two products, one for its weights and one for its input; the latter is left out
    where nobody wants it, and the former in the Q heads that judge the policy.
    """
    m, steps = model, horizon * batch
    hidden, widths = [m.mlp_dim, m.mlp_dim], [m.enc_dim] * max(m.num_enc_layers - 1, 1)
    encoder = _products(m.obs_shape[0], *widths, m.latent_dim)
    dynamics = _products(m.latent_dim + m.action_dim, *hidden, m.latent_dim)
    q_head = _products(m.latent_dim + m.action_dim, *hidden, m.num_bins)  # the reward's too
    policy = _products(m.latent_dim, *hidden, 2 * m.action_dim)

    targets = steps * (encoder + policy + 2 * q_head)
    losses = 3 * batch * encoder - batch * _products(m.obs_shape[0], widths[0])
    losses += 3 * steps * (dynamics + (1 + m.num_q) * q_head)
    if m.episodic:
        losses += 3 * steps * _products(m.latent_dim, *hidden, 1)
    pi = 3 * policy - _products(m.latent_dim, m.mlp_dim) + 2 * 2 * q_head
    return targets + losses + (steps + batch) * pi


def _products(*dims: int) -> int:
    """Operations of a chain of linear layers on one row."""
    return sum(2 * a * b for a, b in pairwise(dims))
