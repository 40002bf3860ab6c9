"""Thresholds as modes get them: from the mismatches of plans that were executed to their end."""

from pathlib import Path

import gymnasium as gym
import numpy as np
import pandas as pd
import pytest
import torch
from stand_ins import Seeded

from tdmpc2.config import EAGER, PlannerConfig
from tdmpc2.evaluation.evaluate import EvaluationConfig, Subject, calibrate
from tdmpc2.mismatch import calibrate_thresholds, mismatch
from tdmpc2.progress import SILENT
from tdmpc2.teacher import Teacher
from tdmpc2.world_model import fingerprint, load_world_model

BUDGET = PlannerConfig(num_samples=16, iterations=2, num_elites=4, num_pi_trajs=4)


class OfSeeds(Teacher):
    """A teacher on the short episodes of these tests."""

    def env(self) -> gym.Env:
        return Seeded()


def test_mismatch_is_a_distance() -> None:
    z = torch.zeros(2, 8)
    z_pred = torch.zeros(2, 8)
    z_pred[0, :2] = torch.tensor([3.0, 4.0])
    assert mismatch(z, z_pred).tolist() == [5.0, 0.0]


def test_false_alarms_are_counted_by_plans_not_by_episodes() -> None:
    """In half of all plans, of which an episode has many, one step stands out."""
    rng = np.random.default_rng(0)
    mismatches = 1 + 0.1 * rng.random((400, 5))
    mismatches[::2, 2] += 1
    steps = pd.DataFrame({"k": np.tile(np.arange(6), 400)})
    steps["mismatch"] = np.pad(mismatches, ((0, 0), (1, 0)), constant_values=np.nan).ravel()
    thresholds = calibrate_thresholds(steps, 0.4, 6)
    assert (mismatches <= thresholds).all(1).mean() == pytest.approx(0.4, abs=0.01)


def test_each_mode_is_given_the_thresholds_of_its_own_steps(tmp_path: Path) -> None:
    model = load_world_model(Path(__file__).parent / "fixtures/official/state_small.pt")
    teacher = OfSeeds("seeds", model, BUDGET, 0.99, fingerprint(model), None, EAGER)
    config = EvaluationConfig(calibration_episodes=6, num_envs=2, quantile=0.8)
    modes = calibrate(Subject(teacher, {}), config, tmp_path, SILENT)
    steps = pd.read_csv(tmp_path / "free/plan/steps.csv")
    assert set(steps["kind"]) == {"planned", "open_loop"}, "executed without fallback"
    assert steps["seed"].unique().tolist() == list(range(10_000, 10_006))
    for name, horizon in (("plan_3", 3), ("plan_6", 6)):
        assert modes[name].execution_horizon == horizon and len(modes[name].threshold or ()) == horizon - 1
        assert modes[name].threshold == pytest.approx(calibrate_thresholds(steps, 0.8, horizon))
    assert modes["plan_3"].threshold != pytest.approx((modes["plan_6"].threshold or ())[:2])
    assert modes["naive_3"].threshold is None and modes["baseline"].execution_horizon == 1
