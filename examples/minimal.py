"""Speculative TD-MPC2, written out: plan, compare, correct, fall back.

    python examples/minimal.py

An agent needs none of this: `tdmpc2.load_agent(folder)` does the same, faster and for many robots at once.
Read this file from top to bottom to see the method. It trains nothing and takes about a minute.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import tdmpc2
from tdmpc2.config import CorrectorConfig, PlannerConfig
from tdmpc2.corrector import BaseCorrector, build_corrector, load_corrector
from tdmpc2.planner import NoiseSource, Planner, warm_start
from tdmpc2.refine import offsets, refine
from tdmpc2.world_model import WorldModel, fingerprint

TASK = "cartpole-swingup"
FOLDER = Path(__file__).parents[1] / "pretrained" / TASK
BUDGET = PlannerConfig(num_samples=128, iterations=4, num_elites=32)
DISCOUNT = 0.99
K = 6  # execution horizon: steps executed per plan


class Episode(NamedTuple):
    total: float  # sum of rewards
    plans: int
    fallbacks: int
    mismatches: list[list[float]]  # by step in plan k


def open_corrector(model: WorldModel) -> BaseCorrector:
    """The corrector that lies beside the teacher, or else an untrained one: it leaves a plan as it is."""
    for name in ("two_tower", "temporal"):
        if (FOLDER / "correctors" / name).exists():
            return load_corrector(FOLDER / "correctors" / name, fingerprint(model))
    config = CorrectorConfig(model.config.latent_dim, model.config.action_dim)
    return build_corrector(config).eval().requires_grad_(False)


@torch.no_grad()
def run(
    model: WorldModel,
    corrector: BaseCorrector,
    seed: int,
    steps: int,
    horizon: int,
    thresholds: list[float] | None = None,
) -> Episode:
    """Act for `steps` steps; a plan ends after `horizon` steps or above a threshold of the mismatch."""
    env = tdmpc2.make_env(TASK, seed=seed)
    obs, _ = env.reset()
    planner = Planner(model, BUDGET, DISCOUNT, NoiseSource(seed))
    samples_around = offsets(model.config.action_dim)
    history = corrector.no_history(1)
    plan: Tensor | None = None  # [1, H, A], actions
    z_pred = torch.zeros(1, model.config.latent_dim)
    k = horizon  # step in plan: a new plan is due
    total, plans, fallbacks = 0.0, 0, 0
    mismatches: list[list[float]] = [[] for _ in range(horizon)]

    for _ in range(steps):
        z = model.encode(torch.from_numpy(obs)[None])  # [1, L], the real latent
        due = k >= horizon

        # Compare: how far is the real latent from the one that the plan predicted?
        fallback = False
        if not due:
            mismatch = (z - z_pred).norm().item()
            mismatches[k].append(mismatch)
            # Fall back: above the threshold of this step the plan is given up. NaN counts as too large.
            fallback = thresholds is not None and not mismatch <= thresholds[k]

        # Plan: MPPI in latent space, started from the last plan, moved on by the steps executed since.
        if due or fallback:
            start = None if plan is None else warm_start(plan, torch.tensor([k]))
            planned = planner.plan(z, start)
            plan, z_pred, k = planned.mean, z, 0
            plans, fallbacks = plans + 1, fallbacks + fallback

        # The planned action. Past the planning horizon H the policy prior extends the plan.
        assert plan is not None
        action_planned = plan[:, k] if k < BUDGET.horizon else model.prior(z)

        # Correct: what would the planner choose now? The corrector was distilled from it.
        history = history.then(corrector.embed(z, z_pred, action_planned, torch.tensor([k])))
        action = action_planned
        if k > 0:
            action = corrector(history, action_planned)
            # Refine: the world model judges 16 actions around it, and the best ones are averaged.
            action = refine(
                model,
                z,
                action,
                action_planned,
                samples_around,
                steps=1,
                discount=DISCOUNT,
                temperature=BUDGET.temperature,
            )

        # Predict the next latent, along the action that is really executed.
        z_pred = model.next(z_pred, action)
        k += 1

        obs, reward, *_ = env.step(action[0].numpy())
        total += float(reward)

    env.close()
    return Episode(total, plans, fallbacks, mismatches)


def main(steps: int = 100) -> None:
    model = tdmpc2.load_world_model(FOLDER)
    corrector = open_corrector(model)

    # Mismatch grows with k. So each step has a threshold of its own, from an episode without fallback.
    # The package calibrates on many episodes, and sets one rate of false alarms for a whole plan.
    calibration = run(model, corrector, seed=1, steps=steps, horizon=K)
    thresholds = [float(np.quantile(m, 0.95)) if m else 0.0 for m in calibration.mismatches]

    for name, episode in (
        ("replanning at every step", run(model, corrector, seed=2, steps=steps, horizon=1)),
        (f"{K} steps a plan, corrected", run(model, corrector, 2, steps, K, thresholds)),
    ):
        print(
            f"{name:28} reward {episode.total:6.1f} in {steps} steps, "
            f"{episode.plans} plans, {episode.fallbacks} of them fallbacks"
        )


if __name__ == "__main__":
    main()
