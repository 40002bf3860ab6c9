"""The planner against the plain reference planner, with the same noise; compiled and bfloat16 against it."""

import math
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tdmpc2.config import ComputeConfig, PlannerConfig, WorldModelConfig
from tdmpc2.errors import ConfigError
from tdmpc2.inference import FastModel
from tdmpc2.planner import NoiseSource, Plan, Planner
from tdmpc2.refine import ELITES, SAMPLES, offsets, refine
from tdmpc2.world_model import WorldModel, load_world_model

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

from reference import reference_plan

DISCOUNT = 0.97
BUDGET = PlannerConfig(horizon=2, iterations=3, num_samples=40, num_elites=6, num_pi_trajs=5)
SMALL = dict(enc_dim=16, mlp_dim=24, latent_dim=32, num_q=5, num_bins=21)
KINDS = {
    "plain": WorldModelConfig((5,), 3, **SMALL),
    "episodic": WorldModelConfig((5,), 3, **SMALL, episodic=True),
    "multi-task": WorldModelConfig((5,), 3, **SMALL, num_tasks=3, task_dim=8, action_dims=(3, 1, 2)),
    "both": WorldModelConfig((5,), 3, **SMALL, episodic=True, num_tasks=3, task_dim=8, action_dims=(3, 1, 2)),
}


class RecordedNoise:
    """Draws noise for a batch, and hands out the same again, for one row of it, from `row`."""

    def __init__(self, seed: int):
        self.source = NoiseSource(seed)
        self.drawn: list[Tensor] = []

    def normal(self, *shape: int) -> Tensor:
        return self._record(self.source.normal(*shape))

    def gumbel(self, *shape: int) -> Tensor:
        return self._record(self.source.gumbel(*shape))

    def two_heads(self, num_q: int) -> Tensor:
        return self._record(self.source.two_heads(num_q))

    def _record(self, noise: Tensor) -> Tensor:
        self.drawn.append(noise)
        return noise

    def row(self, b: int) -> "Replayed":
        return Replayed(b, list(self.drawn))


class Replayed:
    def __init__(self, row: int, drawn: list[Tensor]):
        self.row, self.drawn = row, drawn

    def normal(self, *shape: int) -> Tensor:
        noise = self.drawn.pop(0)  # [H, B, N, A] or [B, N, A]
        return noise[:, self.row] if noise.dim() == 4 else noise[self.row]

    def gumbel(self, *shape: int) -> Tensor:
        return self.drawn.pop(0)[self.row]

    def two_heads(self, num_q: int) -> Tensor:
        return self.drawn.pop(0)


def random_model(kind: str) -> WorldModel:
    """Weights of such a size that values differ, and that about half of all latents are terminal."""
    torch.manual_seed(1)
    model = WorldModel(KINDS[kind]).eval().requires_grad_(False)
    for name, p in model.named_parameters():
        if "ln." not in name:
            p.normal_(0, 0.3)
    for network in (model.reward_head, model.q):
        network[-1].weight.normal_(0, 0.05)
    if model.config.episodic:
        z, task, _ = latents(model, 99)
        logits = model.termination_logits(z, task)
        model.termination_head[-1].bias.sub_(logits.median())
    return model


def latents(model: WorldModel, batch: int) -> tuple[Tensor, Tensor | None, Tensor]:
    """Latents, tasks and a warm start."""
    generator = torch.Generator().manual_seed(batch)
    task = torch.arange(batch) % model.config.num_tasks if model.config.num_tasks else None
    obs = torch.randn(batch, *model.config.obs_shape, generator=generator)
    mean = torch.rand(batch, BUDGET.horizon, model.config.action_dim, generator=generator) - 0.5
    return model.encode(obs, task), task, mean


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_reference_planner_row_by_row(kind: str, batch: int) -> None:
    model, noise = random_model(kind), RecordedNoise(seed=2)
    z, task, mean = latents(model, batch)
    plan = Planner(model, BUDGET, DISCOUNT, noise).plan(z, mean, task=task)  # type: ignore[arg-type]
    for b in range(batch):
        replayed = noise.row(b)
        expected = reference_plan(
            model, BUDGET, DISCOUNT, replayed, z[b], mean[b], None if task is None else task[b]
        )
        assert not replayed.drawn, "noise was left over"
        got = (plan.actions[b], plan.mean[b], plan.std[b], plan.value[b])
        for name, x, y in zip(expected._fields, got, expected, strict=True):
            torch.testing.assert_close(x, y, atol=1e-4, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
    if task is not None:
        padding = model.action_masks[task][:, None] == 0
        assert (plan.mean.masked_select(padding) == 0).all()


def test_termination_matters_in_the_episodic_test_model() -> None:
    model = random_model("episodic")
    z, _, _ = latents(model, 64)
    ended = model.termination(model.next(z, torch.rand(64, 3) * 2 - 1)) > 0.5
    assert 0.1 < ended.float().mean() < 0.9


def test_exploration_moves_the_first_action_alone() -> None:
    model = random_model("plain")
    z, _, mean = latents(model, 2)
    plans = [
        Planner(model, BUDGET, DISCOUNT, NoiseSource(3)).plan(z, mean, eval_mode=eval_mode)
        for eval_mode in (True, False)
    ]
    assert not torch.equal(plans[0].actions[:, 0], plans[1].actions[:, 0])
    assert torch.equal(plans[0].actions[:, 1:], plans[1].actions[:, 1:])
    assert (plans[1].actions.abs() <= 1).all()
    assert torch.equal(plans[0].mean, plans[1].mean)


def test_compiled_equals_eager_and_compiles_twice_whatever_the_batch(monkeypatch, capsys, tmp_path) -> None:
    models = random_model("both"), random_model("both")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("tdmpc2.inference.compiled.PATIENCE", 0.0)

    def plan(model: WorldModel, batch: int, compute: ComputeConfig) -> Plan:
        z, task, mean = latents(model, batch)
        return Planner(model, BUDGET, DISCOUNT, NoiseSource(4), compute).plan(z, mean, task=task)

    for batch in (2, 5, 1, 3, 16):
        compiled = plan(models[batch % 2], batch, ComputeConfig(compile=True))
        eager = plan(models[0], batch, ComputeConfig())
        for x, y in zip(compiled, eager, strict=True):
            torch.testing.assert_close(x, y, atol=1e-3, rtol=1e-3)
    assert len(list((tmp_path / "tdmpc2").iterdir())) == 2
    assert "compiling the planner" in capsys.readouterr().err


def score(fast: FastModel, batch: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    c = fast.config
    z = fast.model.encode(torch.randn(batch, *c.obs_shape, generator=generator))
    actions = torch.rand(batch, 3, 200, c.action_dim, generator=generator) * 2 - 1
    noise = torch.randn(batch, 200, c.action_dim, generator=generator)
    centre = actions.mean(2, keepdim=True)
    return fast.score(fast.origin(z), actions, centre, noise, torch.tensor([0, 1]), fast.weights())


def test_bfloat16_values_are_close() -> None:
    official = Path(__file__).parent / "fixtures" / "official" / "state_small.pt"
    model = load_world_model(official)
    exact, rounded = (score(FastModel(model, 0.99, dtype)) for dtype in (torch.float32, torch.bfloat16))
    assert exact.dtype == rounded.dtype == torch.float32
    error = (exact - rounded).square().mean().sqrt()
    assert 0 < error < 0.1 * exact.std(1).mean()
    top, top_rounded = (set(x[0].topk(20).indices.tolist()) for x in (exact, rounded))
    assert len(top & top_rounded) >= 14


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_planning_follows_the_weights_of_a_model_in_training(dtype: torch.dtype) -> None:
    model = random_model("plain").requires_grad_(True)
    fast = FastModel(model, 0.99, dtype)
    with torch.no_grad():
        before = score(fast)
    assert fast.weights() is fast.weights(), "nothing changed, nothing to copy"
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    model.reward(model.encode(torch.ones(2, 5)), torch.ones(2, 3)).sum().backward()
    optimizer.step()
    with torch.no_grad():
        after, fresh = score(fast), score(FastModel(model, 0.99, dtype))
    assert torch.equal(after, fresh)
    assert not torch.equal(after, before)


def test_unknown_precision_is_refused() -> None:
    with pytest.raises(ConfigError, match="float32"):
        Planner(random_model("plain"), BUDGET, 0.99, NoiseSource(0), ComputeConfig("float16"))


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
        elites = sorted(range(len(samples)), key=lambda i: -values[i])[:ELITES]
        weights = [math.exp(0.7 * (values[i] - values[elites[0]])) for i in elites]
        expected = sum(w * samples[i] for w, i in zip(weights, elites, strict=True)) / sum(weights)
        torch.testing.assert_close(refined[row], expected, atol=1e-4, rtol=1e-4)
        used[[i for i in elites if i < 2]] += 1
    assert used.sum() > 0
