"""The monitor, and its thresholds: from the mismatches of plans that were executed to their end."""

from pathlib import Path

import gymnasium as gym
import numpy as np
import pandas as pd
import pytest
import torch
from stand_ins import Seeded

from tdmpc2.agent import TDMPC2, SpeculativeAgent
from tdmpc2.config import EAGER, PlannerConfig, SpeculationConfig, WorldModelConfig
from tdmpc2.evaluation.calibrate import calibrate
from tdmpc2.evaluation.config import EvaluationConfig
from tdmpc2.evaluation.runs import Subject
from tdmpc2.monitor import Monitor, calibrate_thresholds
from tdmpc2.step import PlanState, PlanStep
from tdmpc2.teacher import Teacher
from tdmpc2.workers import HERE
from tdmpc2.world_model import WorldModel, fingerprint, load_world_model

BUDGET = PlannerConfig(num_samples=16, iterations=2, num_elites=4, num_pi_trajs=4)


class OfSeeds(Teacher):
    """A teacher on the short episodes of these tests."""

    def env(self) -> gym.Env:
        return Seeded()


def watched(monitor: Monitor, z_pred: torch.Tensor, k: list[int]) -> tuple[list[float], list[bool]]:
    """What a monitor measures where every real latent is zero, and where it gives plans up."""
    now = PlanState(torch.zeros_like(z_pred), z_pred, z_pred[:, None], torch.tensor(k), None, None)
    model = WorldModel(WorldModelConfig((5,), 3, latent_dim=8))
    step = PlanStep(model, None, SpeculationConfig(), 3, PlannerConfig(), 0.99)
    measured, given_up = monitor(now, step)
    return measured.tolist(), given_up.tolist()


def test_mismatch_is_a_distance() -> None:
    z_pred = torch.zeros(2, 8)
    z_pred[0, :2] = torch.tensor([3.0, 4.0])
    assert watched(Monitor(), z_pred, [1, 1]) == ([5.0, 0.0], [False, False]), "without a threshold, never"


def test_a_plan_is_given_up_above_the_threshold_of_its_step() -> None:
    z_pred = torch.zeros(6, 8)
    z_pred[:, 0] = torch.tensor([0.5, 0.6, 0.6, 0.7, 0.8, torch.nan])
    _, given_up = watched(Monitor((0.5, 0.7)), z_pred, [1, 1, 2, 2, 9, 2])
    assert given_up == [False, True, False, False, True, True]


def test_another_rule_is_a_monitor_that_measures_something_else() -> None:
    """An agent asks it at every step, and tells it what it would execute."""
    model = load_world_model(Path(__file__).parent / "fixtures/official/state_small.pt")
    seen: list[PlanState] = []

    class Third(Monitor):
        def measure(self, now: PlanState, step: PlanStep) -> torch.Tensor:
            if not seen or not torch.equal(seen[-1].z, now.z):  # asked again after a fallback
                seen.append(now)
            assert step.planned(now).shape == (2, 6)
            return (now.k == 2).float()

    agent = SpeculativeAgent(TDMPC2(model, BUDGET, num_envs=2), SpeculationConfig(9), monitor=Third((0.5,)))
    obs, kinds = torch.randn(6, 2, 24, generator=torch.Generator().manual_seed(0)), []
    for o in obs:
        agent.act(o)
        assert agent.info is not None
        kinds.append(agent.info.kinds[0].name[0])
    assert "".join(kinds) == "POFOFO"
    torch.testing.assert_close(torch.stack([now.z for now in seen]), model.encode(obs))
    assert agent.info.mismatch.tolist() == [0.0, 0.0], "what is measured is in `info`"


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
    modes = calibrate(Subject(teacher, {}), config, tmp_path, HERE)
    steps = pd.read_csv(tmp_path / "free/plan/steps.csv")
    assert set(steps["kind"]) == {"planned", "open_loop"}, "executed without fallback"
    assert steps["seed"].unique().tolist() == list(range(10_000, 10_006))
    for name, horizon in (("plan_3", 3), ("plan_6", 6)):
        assert modes[name].execution_horizon == horizon and len(modes[name].threshold or ()) == horizon - 1
        assert modes[name].threshold == pytest.approx(calibrate_thresholds(steps, 0.8, horizon))
    assert modes["plan_3"].threshold != pytest.approx((modes["plan_6"].threshold or ())[:2])
    assert modes["naive_3"].threshold is None and modes["baseline"].execution_horizon == 1
