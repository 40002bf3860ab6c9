"""How many floating-point operations a plan requires, by formula from the architecture.

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
    latents = p.horizon * dynamics  # predicted for the drawn sequence
    return batch * (p.iterations * iteration + prior + latents)


def _products(*dims: int) -> int:
    """Operations of a chain of linear layers on one row."""
    return sum(2 * a * b for a, b in pairwise(dims))
