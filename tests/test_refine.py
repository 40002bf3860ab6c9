"""Refining: one iteration of a small search around an action, against the same by hand."""

import math

import pytest
import torch
from stand_ins import DISCOUNT, KINDS, random_model

from tdmpc2.refine import SAMPLES, STD, offsets, refine


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_refined_action_is_the_mean_of_elites_by_hand(kind: str, steps: int) -> None:
    model, batch, around = random_model(kind), 4, offsets(3)
    assert around.shape == (SAMPLES, 3) and around.sum(0).abs().max() < 1e-6, "each with its opposite"
    task = torch.arange(batch) % 3 if model.config.num_tasks else None
    generator = torch.Generator().manual_seed(2)
    z = model.encode(torch.randn(batch, 5, generator=generator), task)
    action, planned = 2 * torch.rand(2, batch, 3, generator=generator) - 1
    refined = refine(model, z, action, planned, around, task, steps=steps, discount=DISCOUNT, temperature=0.7)
    used = torch.zeros(2)  # how often the action and the planned one are among the elites
    for row in range(batch):
        own = None if task is None else task[row]
        mask = torch.ones(3) if own is None else model.action_masks[own]
        samples = [action[row], planned[row]]
        samples = [mask * x for x in [*samples, *(action[row] + around).clamp(-1, 1)]]
        values = []
        for x in samples:
            at, total, later = z[row], 0.0, 1.0
            for _ in range(steps):
                total += later * float(model.reward(at, x, own))
                at = model.next(at, x, own)
                later *= DISCOUNT * (not (model.config.episodic and float(model.termination(at, own)) > 0.5))
                x = model.prior(at, own)
            values.append(total + later * float(model.value(at, x, own).mean()))
        elites = sorted(range(len(samples)), key=lambda i: -values[i])[: len(samples) // 4]
        weights = [math.exp(0.7 * (values[i] - values[elites[0]])) for i in elites]
        expected = sum(w * samples[i] for w, i in zip(weights, elites, strict=True)) / sum(weights)
        torch.testing.assert_close(refined[row], expected, atol=1e-4, rtol=1e-4)
        used[[i for i in elites if i < 2]] += 1
    assert used.sum() > 0


def test_samples_are_the_same_always_and_close_by() -> None:
    assert torch.equal(offsets(6), offsets(6))
    assert 0.7 * STD < offsets(50).std() < 1.3 * STD < 0.3


@torch.no_grad()
def test_refined_actions_stay_in_the_box() -> None:
    model = random_model("plain")
    z = model.encode(torch.randn(50, 5, generator=torch.Generator().manual_seed(0)))
    corner = torch.ones(50, 3)
    refined = refine(
        model, z, corner, corner, 10 * offsets(3), steps=1, discount=DISCOUNT, temperature=0.5
    )  # fmt: skip
    assert refined.abs().max() <= 1 + 1e-6


@torch.no_grad()
def test_a_sample_whose_value_is_no_number_is_no_elite(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model("plain")
    z, action = model.encode(torch.ones(2, 5)), torch.tensor([[0.1, 0.2, 0.3], [0.0, 0.0, 0.0]])
    value = model.value

    def broken(z: torch.Tensor, action: torch.Tensor, task: None) -> torch.Tensor:
        values = value(z, action, task).abs() + 100.0
        values[..., 0] = torch.nan  # of the action itself
        return values

    monkeypatch.setattr(model, "value", broken)
    far = torch.full((2, 3), 0.5)
    around = torch.full((SAMPLES, 3), 0.5)
    refined = refine(model, z, action, far, around, steps=1, discount=1.0, temperature=0.5)
    assert (refined >= 0.5 - 1e-6).all(), "all samples but the action itself are there"
