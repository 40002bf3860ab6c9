"""The speculative agent's clock, buffer, mismatch, fallback and correction."""

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from stand_ins import Silence, Tracing

from tdmpc2.agent import TDMPC2, Kind, SpeculativeAgent
from tdmpc2.config import (
    COMPILED,
    EAGER,
    ComputeConfig,
    CorrectorConfig,
    PlannerConfig,
    SpeculationConfig,
)
from tdmpc2.corrector import build_corrector
from tdmpc2.errors import ConfigError, DataError, ObservationError
from tdmpc2.evaluation.modes import ALONE, DISTILLED
from tdmpc2.monitor import calibrate_thresholds
from tdmpc2.planner import Plan
from tdmpc2.refine import offsets, refine
from tdmpc2.world_model import load_world_model

BUDGET = PlannerConfig(num_samples=16, iterations=2, num_elites=4, num_pi_trajs=4)


@pytest.fixture(scope="module")
def model():
    return load_world_model(Path(__file__).parent / "fixtures/official/state_small.pt")


def observations(steps: int, rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(steps, rows, 24, generator=torch.Generator().manual_seed(seed))


def agent_of(model, network=None, num_envs: int = 1, **speculation) -> SpeculativeAgent:
    teacher = TDMPC2(model, BUDGET, num_envs=num_envs)
    return SpeculativeAgent(teacher, SpeculationConfig(**speculation), network)


def kinds(agent: SpeculativeAgent, obs: torch.Tensor) -> list[list[str]]:
    agent.reset()
    rows = []
    for o in obs:
        agent.act(o)
        rows.append([Kind(int(k)).name for k in agent.info.kind])
    return rows


def noisy_corrector(model, architecture: str = "two_tower"):
    torch.manual_seed(0)
    corrector = build_corrector(
        CorrectorConfig(model.config.latent_dim, model.config.action_dim, architecture)
    )
    for p in corrector.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return corrector.eval().requires_grad_(False)


def test_execution_horizon_one_is_the_teacher(model) -> None:
    teacher, agent = TDMPC2(model, BUDGET), agent_of(model, execution_horizon=1)
    teacher.reset()
    agent.reset()
    for obs in observations(5, 1):
        torch.testing.assert_close(teacher.act(obs), agent.act(obs), rtol=0, atol=0)
        assert agent.info.kind.tolist() == [Kind.PLANNED]


def test_clock_of_naive_execution(model) -> None:
    seen = kinds(agent_of(model, execution_horizon=3), observations(7, 1))
    assert [k[0] for k in seen] == ["PLANNED", "OPEN_LOOP", "OPEN_LOOP"] * 2 + ["PLANNED"]


def test_open_loop_executes_the_plan(model) -> None:
    agent, teacher = agent_of(model, execution_horizon=3), TDMPC2(model, BUDGET)
    agent.reset()
    obs = observations(3, 1)
    z_pred = teacher.encode(obs[0])
    plan = teacher.plan(z_pred)
    for t in range(3):
        torch.testing.assert_close(agent.act(obs[t]), plan.mean[:, t])
        drift = (teacher.encode(obs[t]) - z_pred).norm(dim=-1)
        z_pred = model.next(z_pred, plan.mean[:, t])
        if t == 0:
            assert agent.info.mismatch.isnan().all(), "nothing was predicted for the first step"
        else:
            torch.testing.assert_close(agent.info.mismatch, drift, atol=1e-5, rtol=1e-4)


def test_fallback_above_the_threshold_only(model) -> None:
    obs = observations(6, 1)
    free = agent_of(model, execution_horizon=6)
    free.reset()
    drifts = []
    for o in obs:
        free.act(o)
        drifts.append(float(free.info.mismatch[0]))
    # A threshold between the first two drifts' values: decides step 1 alone.
    below, above = drifts[1] * 0.999, drifts[1] * 1.001
    assert kinds(agent_of(model, execution_horizon=6, threshold=(below,)), obs[:2])[1] == ["FALLBACK"]
    assert kinds(agent_of(model, execution_horizon=6, threshold=(above,)), obs[:2])[1] == ["OPEN_LOOP"]


def test_every_step_in_plan_has_a_threshold_of_its_own(model) -> None:
    """The last one holds for all that come later."""
    free, never = (math.inf,), (0.0,)
    for threshold, expected in (
        (free * 2 + never, "POOFOO"),
        (never + free, "PFFFFF"),
        (free + never, "POFOFO"),
    ):
        seen = kinds(agent_of(model, execution_horizon=20, threshold=threshold), observations(6, 1))
        assert "".join(k[0][0] for k in seen) == expected


@pytest.mark.parametrize("threshold", [None, (1e6,)])
def test_a_prediction_that_is_no_number_ends_the_plan(model, monkeypatch, threshold) -> None:
    agent = agent_of(model, execution_horizon=3, threshold=threshold)
    labeller = TDMPC2(model, BUDGET)
    first, second, third = observations(3, 1)
    plan = labeller.plan(labeller.encode(first))
    agent.reset()
    with monkeypatch.context() as patch:
        patch.setattr(model, "next", lambda z, *_: torch.full_like(z, torch.nan))
        agent.act(first, plan)
    torch.testing.assert_close(agent.act(second, plan), plan.actions[:, 0])
    assert agent.info.kind.tolist() == [Kind.FALLBACK] and agent.info.mismatch.isnan().all()
    agent.act(third, plan)
    assert agent.info.kind.tolist() == [Kind.OPEN_LOOP] and agent.info.mismatch.isfinite().all()


def test_fallback_executes_the_first_action_of_one_new_plan(model, monkeypatch) -> None:
    agent = agent_of(model, execution_horizon=3, threshold=(0.0,))
    agent.reset()
    plans: list[Plan] = []
    plan = agent.teacher.planner.plan
    monkeypatch.setattr(
        agent.teacher.planner, "plan", lambda *a, **k: plans.append(plan(*a, **k)) or plans[-1]
    )
    for t, obs in enumerate(observations(4, 1)):
        action = agent.act(obs)
        assert len(plans) == t + 1, "a fallback plans once"
        first = plans[-1].actions if t else plans[-1].mean  # after a plan, the next is drawn from
        torch.testing.assert_close(action, first[:, 0])
    assert agent.info.kind.tolist() == [Kind.FALLBACK]


def test_warm_start_moves_by_the_steps_executed(model, monkeypatch) -> None:
    agent = agent_of(model, execution_horizon=2)
    agent.reset()
    starts, means = [], []
    plan = agent.teacher.planner.plan

    def recording(z, mean, **kwargs):
        starts.append(mean.clone())
        result = plan(z, mean, **kwargs)
        means.append(result.mean.clone())
        return result

    monkeypatch.setattr(agent.teacher.planner, "plan", recording)
    for obs in observations(3, 1):
        agent.act(obs)
    assert (starts[0] == 0).all()
    torch.testing.assert_close(starts[1][:, 0], means[0][:, 2])
    assert (starts[1][:, 1:] == 0).all()


def test_rows_have_clocks_of_their_own(model) -> None:
    agent = agent_of(model, execution_horizon=3, num_envs=2)
    agent.reset()
    obs = observations(3, 2)
    agent.act(obs[0])
    agent.reset(torch.tensor([False, True]))
    agent.act(obs[1])
    assert agent.info.kind.tolist() == [Kind.OPEN_LOOP, Kind.PLANNED]
    assert agent.info.k.tolist() == [1, 0]
    agent.act(obs[2])
    assert agent.info.k.tolist() == [2, 1]


@pytest.mark.parametrize("architecture", ["two_tower", "temporal"])
def test_a_batch_acts_as_its_rows_alone(model, architecture) -> None:
    corrector = noisy_corrector(model, architecture)
    obs = observations(9, 3)

    def run(rows: list[int]) -> torch.Tensor:
        agent = agent_of(
            model, corrector, len(rows), execution_horizon=4, threshold=(0.9,), corrector=architecture
        )
        agent.teacher.planner.noise = Silence()
        agent.reset()
        return torch.stack([agent.act(o[rows]) for o in obs])

    together = run([0, 1, 2])
    for row in range(3):
        torch.testing.assert_close(run([row])[:, 0], together[:, row], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("steps", [1, 3])
def test_what_the_corrector_answers_is_refined(model, steps: int) -> None:
    corrector = noisy_corrector(model)
    agent = agent_of(model, corrector, 2, execution_horizon=3, corrector="two_tower", refine_steps=steps)
    agent.reset()
    first, second = observations(2, 2)
    z_pred = model.next(model.encode(first), agent.act(first))
    z, planned, k = model.encode(second), agent._now.plan[:, 1].clone(), torch.ones(2, dtype=torch.long)
    answer = corrector(corrector.no_history(2).then(corrector.embed(z, z_pred, planned, k)), planned)
    planner = agent.teacher.planner
    expected = refine(
        model,
        z,
        answer,
        planned,
        offsets(planned.shape[1]),
        steps=steps,
        discount=planner.discount,
        temperature=planner.config.temperature,
    )
    assert (expected - answer).norm() > 0.01 and (answer - planned).norm() > 0.01
    torch.testing.assert_close(agent.act(second), expected, atol=1e-5, rtol=1e-4)


def test_prior_alone_never_plans(model, monkeypatch) -> None:
    agent = agent_of(model, execution_horizon=1, plan_length=0)
    agent.reset()
    monkeypatch.setattr(agent.teacher, "plan", lambda *a: pytest.fail("planned"))
    for obs in observations(3, 1):
        torch.testing.assert_close(agent.act(obs), model.pi(model.encode(obs)).mean)
        assert agent.info.kind.tolist() == [Kind.PRIOR]


def test_without_plans_giving_up_is_no_planner_call(model, monkeypatch) -> None:
    agent = agent_of(model, execution_horizon=3, plan_length=0, threshold=(0.0,))
    agent.reset()
    monkeypatch.setattr(agent.teacher, "plan", lambda *a: pytest.fail("planned"))
    for obs in observations(5, 1):
        torch.testing.assert_close(agent.act(obs), model.pi(model.encode(obs)).mean)
        assert agent.info.kind.tolist() == [Kind.PRIOR]
    assert agent.info.mismatch.item() > 0, "the mismatch was too large"


def test_past_the_horizon_the_prior_plans_and_prediction_follows_what_is_executed(model) -> None:
    corrector = noisy_corrector(model)
    agent = agent_of(model, corrector, execution_horizon=6, corrector="two_tower")
    teacher = TDMPC2(model, BUDGET)
    agent.reset()
    obs = observations(6, 1)
    plan = teacher.plan(teacher.encode(obs[0]))
    z_pred = model.encode(obs[0])
    for t in range(6):
        action, z = agent.act(obs[t]), model.encode(obs[t])
        if t > 0:
            torch.testing.assert_close(agent.info.mismatch, (z - z_pred).norm(dim=-1))
        planned = plan.mean[:, t] if t < 3 else model.pi(z).mean
        moved = (action - planned).norm(dim=-1)
        torch.testing.assert_close(agent.info.correction, moved, atol=1e-5, rtol=1e-4)
        assert (moved > 1e-3).all() == (t > 0)
        z_pred = model.next(z_pred, action)


@pytest.mark.parametrize("architecture", ["two_tower", "temporal"])
def test_untrained_corrector_executes_the_plan(model, architecture) -> None:
    fresh = build_corrector(
        CorrectorConfig(model.config.latent_dim, model.config.action_dim, architecture)
    ).eval()
    corrected = agent_of(model, fresh, execution_horizon=6, corrector=architecture)
    naive = agent_of(model, execution_horizon=6)
    corrected.reset()
    naive.reset()
    for obs in observations(8, 1):
        torch.testing.assert_close(corrected.act(obs), naive.act(obs))


@pytest.mark.parametrize(
    ("architecture", "name", "task", "compiler"),
    [
        ("temporal", "mt30_small", 4, True),
        ("two_tower", "state_small", None, False),
        ("temporal", "state_small", None, False),
        ("two_tower", "mt30_small", 4, False),
        ("distilled", "state_small", None, False),
    ],
)
def test_compiled_step_is_the_eager_one(
    architecture: str, name: str, task: int | None, compiler: bool, monkeypatch, tmp_path
) -> None:
    """Replanned, corrected, past the planning horizon; one library serves all execution horizons.

    The compiler works on one step; the others are traced for it.
    """
    model = load_world_model(Path(__file__).parent / f"fixtures/official/{name}.pt")
    corrector, obs = noisy_corrector(model, architecture), torch.randn(8, 1, *model.config.obs_shape)
    labeller = TDMPC2(model, BUDGET, task=task)
    plan = labeller.plan(labeller.encode(obs[0]))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tracing = Tracing()
    if not compiler:
        monkeypatch.setattr("tdmpc2.inference.ahead.library", tracing)

    def run(horizon: int, compute: ComputeConfig) -> list[torch.Tensor]:
        mode = SpeculationConfig(execution_horizon=horizon, corrector=architecture)
        mode = ALONE if architecture == DISTILLED else mode
        agent = SpeculativeAgent(TDMPC2(model, BUDGET, task=task, compute=compute), mode, corrector)
        agent.reset()
        return [torch.cat([agent.act(o, plan)[0], agent.info.correction]) for o in obs]

    for horizon in (3, 5):
        compiled, eager = run(horizon, COMPILED), run(horizon, EAGER)
        torch.testing.assert_close(compiled, eager, atol=1e-4, rtol=1e-4, equal_nan=True)
    made = [path.name for path in (tmp_path / "tdmpc2").iterdir()] if compiler else tracing.made
    assert len(made) == 1


def test_plan_handed_in_is_used(model) -> None:
    agent = agent_of(model, execution_horizon=2, num_envs=2)
    labeller = TDMPC2(model, BUDGET, num_envs=2, seed=7)
    agent.reset()
    agent.teacher.plan = lambda *a: pytest.fail("asked the teacher")
    obs = observations(2, 2)
    plan = labeller.plan(labeller.encode(obs[0]))
    torch.testing.assert_close(agent.act(obs[0], plan), plan.mean[:, 0])
    torch.testing.assert_close(agent.act(obs[1], plan), plan.mean[:, 1])


def test_arrays_come_back_as_they_went_in(model) -> None:
    agent = agent_of(model)
    agent.reset()
    alone = agent.act(np.zeros(24, dtype=np.float64))
    assert isinstance(alone, np.ndarray) and alone.shape == (6,) and alone.dtype == np.float32
    batch = agent.act(torch.zeros(1, 24))
    assert isinstance(batch, torch.Tensor) and batch.shape == (1, 6)


def test_bad_observations_are_named(model) -> None:
    agent = agent_of(model)
    with pytest.raises(ObservationError, match="NaN"):
        agent.act(np.full(24, np.nan))
    with pytest.raises(ObservationError, match=r"\(17,\)"):
        agent.act(np.zeros(17))


def test_bad_settings_are_named(model) -> None:
    with pytest.raises(ConfigError, match="execution_horizon=0"):
        agent_of(model, execution_horizon=0)
    with pytest.raises(ConfigError, match="refine_steps=-1"):
        agent_of(model, refine_steps=-1)
    with pytest.raises(ConfigError, match="plan_length=4"):
        agent_of(model, plan_length=4)
    multi = load_world_model(Path(__file__).parent / "fixtures/official/mt30_small.pt")
    with pytest.raises(ConfigError, match="0 to 29"):
        TDMPC2(multi, BUDGET)


def plans(mismatches: np.ndarray) -> pd.DataFrame:
    """Steps of plans that were executed without fallback; `mismatches` `[n, K - 1]`, one row a plan."""
    k = np.tile(np.arange(mismatches.shape[1] + 1), len(mismatches))
    return pd.DataFrame(
        {"k": k, "mismatch": np.pad(mismatches, ((0, 0), (1, 0)), constant_values=np.nan).ravel()}
    )


@pytest.mark.parametrize("horizon", [2, 4, 24])
def test_a_share_of_whole_plans_stays_below_the_thresholds(horizon: int) -> None:
    """Whatever the execution horizon, and though mismatch grows with the step in plan."""
    rng = np.random.default_rng(0)
    mismatches = np.arange(1, 24) * rng.gamma(3.0, size=(500, 23))
    thresholds = calibrate_thresholds(plans(mismatches), 0.9, horizon)
    assert len(thresholds) == horizon - 1
    below = (mismatches[:, : horizon - 1] <= thresholds).all(1)
    assert below.mean() == pytest.approx(0.9, abs=0.003)
    ratio = np.array(thresholds) / np.quantile(mismatches[:, : horizon - 1], 0.9, axis=0)
    np.testing.assert_allclose(ratio, ratio[0], err_msg="one factor for all steps")


def test_what_cannot_be_calibrated_is_said() -> None:
    with pytest.raises(DataError, match="beyond k = 0"):
        calibrate_thresholds(plans(np.ones((1, 0))), 0.5, 3)
    with pytest.raises(DataError, match="beyond k = 0"):
        calibrate_thresholds(plans(np.full((3, 2), np.nan)), 0.5, 3)
    exact = calibrate_thresholds(plans(np.zeros((3, 2))), 0.5, 3)
    assert all(np.isfinite(exact)), "a world that is predicted exactly"
