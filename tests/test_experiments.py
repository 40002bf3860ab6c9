"""The variants that `research/experiments.py` compares do what their names say."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from research import experiments
from tdmpc2.agent import TDMPC2, SpeculativeAgent
from tdmpc2.config import EAGER, CorrectorConfig, PlannerConfig, SpeculationConfig
from tdmpc2.corrector import BaseCorrector, build_corrector
from tdmpc2.distillation.dataset import Recording, episode_bounds
from tdmpc2.evaluation.modes import PRIOR
from tdmpc2.monitor import Monitor
from tdmpc2.refine import offsets, refine
from tdmpc2.step import PlanState, PlanStep
from tdmpc2.teacher import Teacher
from tdmpc2.world_model import load_world_model

BUDGET = PlannerConfig(num_samples=16, iterations=2, num_elites=4, num_pi_trajs=4)
MODEL = load_world_model(Path(__file__).parent / "fixtures/official/state_small.pt")
GENERATOR = torch.Generator().manual_seed(0)
OBSERVATIONS = torch.randn(12, 1, 24, generator=GENERATOR)


def measured(monitor: Monitor, steps: int = 6) -> torch.Tensor:
    """What a rule compares with the threshold in the steps after the first of one long plan."""
    agent = SpeculativeAgent(TDMPC2(MODEL, BUDGET), SpeculationConfig(100), monitor=monitor)
    agent.reset()
    seen = []
    for obs in OBSERVATIONS[:steps]:
        agent.act(obs)
        seen.append(agent.info.mismatch)
    return torch.cat(seen)[1:]


def step_of(corrector: BaseCorrector | None) -> PlanStep:
    return PlanStep(MODEL, corrector, SpeculationConfig(3), 3, BUDGET, 0.99)


def test_mismatch_in_units_of_the_last_step() -> None:
    z = MODEL.encode(OBSERVATIONS[:6, 0])
    moved = z.diff(dim=0).norm(dim=-1) + 1e-3
    torch.testing.assert_close(measured(experiments.RelativeMismatch()), measured(Monitor()) / moved)


def test_action_gap_is_that_of_the_prior() -> None:
    z, z_pred = MODEL.encode(OBSERVATIONS[:2, 0]).split(1)
    now = PlanState(z, z_pred, torch.zeros(1, 3, 6), torch.ones(1).long(), None, None)
    rule = experiments.ActionGap()
    expected = (MODEL.prior(z) - MODEL.prior(z_pred)).norm(dim=-1)
    torch.testing.assert_close(rule.measure(now, step_of(None)), expected)
    assert rule.measure(now._replace(z=z_pred), step_of(None)) == 0


def test_refined_prior_is_the_prior_refined() -> None:
    untrained = experiments.untrained(CorrectorConfig(MODEL.config.latent_dim, MODEL.config.action_dim))
    agent = SpeculativeAgent(TDMPC2(MODEL, BUDGET), replace(PRIOR, refine_steps=1), untrained)
    discount, temperature = agent.teacher.planner.discount, agent.teacher.planner.config.temperature
    moved = 0.0
    for obs in OBSERVATIONS[:4]:
        z = MODEL.encode(obs)
        prior = MODEL.prior(z)
        expected = refine(
            MODEL, z, prior, prior, offsets(6), steps=1, discount=discount, temperature=temperature
        )
        torch.testing.assert_close(agent.act(obs), expected)
        moved += float((expected - prior).norm())
    assert moved > 0.01


def corrector_of(architecture: str) -> BaseCorrector:
    torch.manual_seed(0)
    config = CorrectorConfig(MODEL.config.latent_dim, MODEL.config.action_dim, architecture, width=32)
    corrector = build_corrector(config)
    for p in corrector.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return corrector.eval().requires_grad_(False)


@pytest.mark.parametrize("rule", ["ValueGap", "Disagreement"])
@pytest.mark.parametrize("refine_steps", [0, 1])
def test_rules_judge_the_action_that_would_be_executed(rule: str, refine_steps: int) -> None:
    own, other = corrector_of("temporal"), corrector_of("two_tower")
    monitor = experiments.Disagreement(None, other) if rule == "Disagreement" else experiments.ValueGap()
    mode = SpeculationConfig(100, corrector="temporal", refine_steps=refine_steps)
    agent = SpeculativeAgent(TDMPC2(MODEL, BUDGET), mode, own, monitor)
    agent.reset()
    for t, obs in enumerate(OBSERVATIONS[:6]):  # past the plan's end too
        z = MODEL.encode(obs)
        now = agent._now._replace(z=z, plan=agent._now.plan.clone())
        action = agent.act(obs)
        if not t:
            continue
        if rule == "ValueGap":
            values = [MODEL.value(z, a).mean(0) for a in (MODEL.prior(z), action)]
            expected = values[0] - values[1]
        else:
            planned = agent.step.planned(now)
            answer = other(other.no_history(1).then(other.embed(z, now.z_pred, planned, now.k)), planned)
            expected = (action - answer).norm(dim=-1)
        torch.testing.assert_close(agent.info.mismatch, expected)
        assert expected.abs() > 1e-4


def test_error_is_estimated_where_it_is() -> None:
    """The teacher's answers are off in one of the two episodes to train on, as planned in the other."""
    data = recording([60, 60, 60, 60])
    teacher = data.plan[:, 0].clone()
    teacher[60:120] += 1.0
    data = data._replace(teacher_action=teacher)
    data.latent[60:120, 0] += 1.0
    corrector = build_corrector(CorrectorConfig(MODEL.config.latent_dim, 6, "two_tower", width=32)).eval()
    head = experiments.error_estimate(
        MODEL, corrector.requires_grad_(False), data, experiments.CorrectorTrainConfig(rollout_steps=4)
    )
    k, plan = torch.ones(240, dtype=torch.long), torch.zeros(240, 3, 6)
    now = PlanState(data.latent, data.latent, plan, k, corrector.no_history(240), None)
    estimate = experiments.OwnError(None, head).measure(now, step_of(corrector))
    assert estimate[60:120].mean() > 4 and estimate[120:180].mean() < 2, "six actions are off by one"


def test_a_corrector_that_sees_the_prior_sees_it() -> None:
    config = CorrectorConfig(MODEL.config.latent_dim, MODEL.config.action_dim, "two_tower", width=32)
    corrector = experiments.WithPrior(config, prior=MODEL.prior)
    z = MODEL.encode(OBSERVATIONS[:2, 0])
    planned, k = torch.zeros(2, 6), torch.ones(2, dtype=torch.long)
    sees = corrector.embed(z, z, planned, k)
    corrector.real.weight.data[..., -6:] = 0.0  # blind to the prior's action
    assert not torch.allclose(corrector.embed(z, z, planned, k), sees)


def recording(lengths: list[int]) -> Recording:
    """Episodes of those lengths, with the seeds 7, 8, ..."""
    steps = sum(lengths)
    ends = torch.zeros(steps, dtype=torch.uint8)
    ends[torch.tensor(lengths).cumsum(0) - 1] = 1
    first, last = episode_bounds(ends)
    return Recording(
        latent=MODEL.encode(torch.randn(steps, 24, generator=GENERATOR)),
        plan=torch.zeros(steps, 3, 6),
        drawn=torch.zeros(steps, 6),
        teacher_action=torch.zeros(steps, 6),
        first=first,
        last=last,
        seed=7 + first.unique(return_inverse=True)[1],
        teacher="",
    )


def test_labels_are_means_of_the_teachers_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    data, teacher = recording([4, 2]), Teacher("", MODEL, BUDGET, 0.99, "", None, EAGER)
    monkeypatch.setattr(experiments, "DRAWS", 2)
    drawn = torch.zeros(2, 4, 6)
    for draw in range(2):
        agent = teacher.agent(2, seed=draw)
        for t in range(2):
            drawn[draw, t] = agent.plan(data.latent[[t, 4 + t]]).mean[0, 0]
    label = experiments.mean_label(data, teacher)
    torch.testing.assert_close(label[:2], drawn.mean(0)[:2])
    assert (label != 0).any(1).all(), "every step is labelled"


def test_episodes_are_cut_out_whole() -> None:
    data = recording([4, 2, 3])
    kept = experiments.episodes(data, torch.tensor([7, 9]))
    torch.testing.assert_close(kept.latent, data.latent[[0, 1, 2, 3, 6, 7, 8]])
    assert kept.first.tolist() == [0] * 4 + [4] * 3 and kept.last.tolist() == [3] * 4 + [6] * 3


def calibration_steps() -> pd.DataFrame:
    """200 plans of 5 steps; mismatch grows with the step in plan."""
    rng = np.random.default_rng(0)
    k = np.tile(np.arange(5), 200)
    mismatch = np.where(k > 0, k * rng.exponential(size=1000) - 0.1, np.nan)
    return pd.DataFrame({"k": k, "mismatch": mismatch})


@pytest.mark.parametrize(
    ("rule", "shift"),
    [
        (experiments.STANDARD, 0.0),
        (experiments.PER_STEP, 0.0),
        (experiments.ONE_FOR_ALL, 0.0),
        ("value gap", 0.0),
        ("value gap", -5.0),
    ],
)
def test_thresholds_of_rules_have_the_rate_of_false_alarms_that_was_asked_for(
    rule: str, shift: float
) -> None:
    steps = calibration_steps()
    steps["mismatch"] += shift
    limits = experiments.thresholds(rule, steps, 0.9)
    assert len(limits) == (1 if rule == experiments.ONE_FOR_ALL else 4)
    later = steps[steps["k"] > 0]
    above = later["mismatch"] > np.resize(limits, 4)[later["k"] - 1]
    if rule == experiments.PER_STEP:
        np.testing.assert_allclose(above.groupby(later["k"]).mean(), 0.1, atol=0.01)
    else:
        assert above.groupby((steps["k"] == 0).cumsum()).max().mean() == pytest.approx(0.1, abs=0.02)


def test_trained_variants_change_one_thing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss is a setting, so what chooses the best weights is the same; rounds are in order from 10 on."""
    folders = {"teacher": [7], **{f"round-{i}": [7 + i] for i in range(1, 12)}}
    for name in folders:
        (tmp_path / "data" / name).mkdir(parents=True)
    data = recording([2] * 12)
    own = {name: experiments.episodes(data, torch.tensor(seeds)) for name, seeds in folders.items()}
    monkeypatch.setattr(experiments, "load_shards", lambda folder, _: own[folder.name])
    monkeypatch.setattr(experiments, "mean_label", lambda data, teacher: data.teacher_action)
    teacher = Teacher("", MODEL, BUDGET, 0.99, "", None, EAGER)
    config = experiments.CorrectorTrainConfig(architecture="two_tower", loss="l1")
    runs = []
    experiments.training(data, tmp_path, teacher, config, lambda *run: runs.append(run))
    changed = {
        (experiment, variant): {k: v for k, v in vars(settings).items() if v != getattr(config, k)}
        for experiment, variant, _, settings in runs
    }
    assert changed["loss", "squared distance"] == {"loss": "mse"}
    assert changed["unrolled steps", "6"] == {"rollout_steps": 6}
    assert [e for e, _ in changed if e == "loss"] == ["loss"], "the other one only"
    seen = [
        (variant.split(":")[0], len(d.seed.unique()))
        for experiment, variant, d, _ in runs
        if experiment == "data"
    ]
    assert seen == [("up to teacher", 1), *((f"up to round-{i}", 1 + i) for i in range(1, 11))]
    experiments.training(data, tmp_path, teacher, replace(config, loss="mse"), lambda *run: runs.append(run))
    assert "L1 distance" in [variant for experiment, variant, *_ in runs if experiment == "loss"]
