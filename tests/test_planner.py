"""The planner against the plain reference planner, with the same noise; compiled and bfloat16 against it."""

import sys
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import pytest
import torch
from stand_ins import BUDGET, DISCOUNT, KINDS, Tracing, latents, random_model
from torch import Tensor

from tdmpc2.config import ComputeConfig
from tdmpc2.errors import ConfigError
from tdmpc2.inference import FastModel, FollowedWeights, compiled, origin
from tdmpc2.planner import NoiseSource, Plan, Planner, warm_start
from tdmpc2.world_model import WorldModel, load_world_model

sys.path.append(str(Path(__file__).parents[1] / "research"))

from reference import reference_plan


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


@pytest.mark.parametrize(("batch", "horizon"), [(1, 2), (3, 3)])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_reference_planner_row_by_row(kind: str, batch: int, horizon: int) -> None:
    model, noise, budget = random_model(kind), RecordedNoise(seed=2), replace(BUDGET, horizon=horizon)
    z, task, mean = latents(model, batch, horizon)
    plan = Planner(model, budget, DISCOUNT, noise).plan(z, mean, task=task)  # type: ignore[arg-type]
    for b in range(batch):
        replayed = noise.row(b)
        expected = reference_plan(
            model, budget, DISCOUNT, replayed, z[b], mean[b], None if task is None else task[b]
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


@pytest.mark.parametrize("kind", ["plain", "multi-task"])
def test_exploration_moves_the_first_action_alone_as_far_as_the_search_is_wide(kind: str) -> None:
    model, noise = random_model(kind), RecordedNoise(3)
    z, task, mean = latents(model, 3)
    still, explored = (
        Planner(model, BUDGET, DISCOUNT, source).plan(z, mean, eval_mode=source is not noise, task=task)  # type: ignore[arg-type]
        for source in (NoiseSource(3), noise)
    )
    moved = still.actions[:, 0] + still.std[:, 0] * noise.drawn[-1][0]
    assert (moved.abs() > 1).any() and (still.std[:, 0] != still.std[:, 1]).any()
    torch.testing.assert_close(explored.actions[:, 0], moved.clamp(-1, 1))
    assert torch.equal(still.actions[:, 1:], explored.actions[:, 1:])
    assert torch.equal(still.mean, explored.mean)
    if task is not None:
        assert (explored.actions.masked_select(model.action_masks[task][:, None] == 0) == 0).all()


def test_an_elite_that_is_far_better_is_drawn_always() -> None:
    model = random_model("plain")
    z, _, mean = latents(model, 8)
    planner = Planner(model, BUDGET, DISCOUNT, NoiseSource(0))
    values = 100.0 * torch.arange(BUDGET.num_samples).expand(8, -1)
    planner.iteration.fast.score = lambda *_: values  # type: ignore[method-assign]
    plan = planner.plan(z, mean)
    torch.testing.assert_close(plan.actions, plan.mean)


def test_the_search_never_narrows_to_a_point() -> None:
    model = random_model("plain")
    z, _, mean = latents(model, 2)
    one_elite = replace(BUDGET, num_elites=1, min_std=0.3)
    plan = Planner(model, one_elite, DISCOUNT, NoiseSource(0)).plan(z, mean)
    torch.testing.assert_close(plan.std, torch.full_like(plan.std, 0.3))


def test_a_sample_whose_value_is_no_number_is_never_followed() -> None:
    model = random_model("plain")
    z, _, mean = latents(model, 2)
    planner = Planner(model, replace(BUDGET, iterations=1), DISCOUNT, NoiseSource(0))
    score, samples = planner.iteration.fast.score, []

    def broken(at: object, actions: Tensor, *rest: object) -> Tensor:
        samples.append(actions)
        values = score(at, actions, *rest).abs() + 1.0  # type: ignore[arg-type]
        return values.index_fill(1, torch.arange(30), torch.nan)

    planner.iteration.fast.score = broken  # type: ignore[method-assign]
    plan = planner.plan(z, mean)
    assert plan.value.isfinite().all() and plan.mean.isfinite().all()
    followed = (plan.actions[:, :, None] == samples[0]).all(-1).all(1)  # [B, N]
    assert followed[:, 30:].any(1).all() and not followed[:, :30].any()


def test_warm_start_moves_on_and_ends_in_zeros() -> None:
    mean = torch.arange(1.0, 7.0).view(1, 3, 2).repeat(4, 1, 1)
    moved = warm_start(mean, torch.tensor([0, 1, 2, 7]))
    assert moved[..., 0].tolist() == [[1, 3, 5], [3, 5, 0], [5, 0, 0], [0, 0, 0]]
    assert moved[..., 1].tolist() == [[2, 4, 6], [4, 6, 0], [6, 0, 0], [0, 0, 0]]


@pytest.mark.parametrize(
    "budget",
    [
        dict(horizon=0),
        dict(iterations=0),
        dict(num_samples=0),
        dict(num_elites=0),
        dict(num_elites=41),
        dict(num_pi_trajs=41),
        dict(num_pi_trajs=-1),
    ],
)
def test_a_budget_that_cannot_be_is_named(budget: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=next(iter(budget))):
        Planner(random_model("plain"), replace(BUDGET, **budget), DISCOUNT, NoiseSource(0))


def test_noise_is_that_of_its_seed() -> None:
    for draw in (lambda s: s.normal(2, 3), lambda s: s.gumbel(4), lambda s: s.two_heads(1000)):
        first, again, other = (draw(NoiseSource(seed)) for seed in (5, 5, 6))
        assert torch.equal(first, again) and not torch.equal(first, other)


def test_elites_are_drawn_by_their_scores() -> None:
    score = torch.tensor([0.6, 0.3, 0.1])
    drawn = (score.log() + NoiseSource(0).gumbel(20_000, 3)).argmax(1)
    torch.testing.assert_close(drawn.bincount() / len(drawn), score, atol=0.02, rtol=0.0)


def test_any_two_q_heads_judge() -> None:
    noise = NoiseSource(0)
    pairs = {tuple(sorted(noise.two_heads(4).tolist())) for _ in range(100)}
    assert pairs == set(combinations(range(4), 2))


@pytest.mark.parametrize("compiler", [True, False])
def test_compiled_equals_eager_and_compiles_twice_whatever_the_batch(
    compiler: bool, monkeypatch, capsys, tmp_path
) -> None:
    """The compiler works on what serves larger batches; what serves a single one is traced for it."""
    models = random_model("both"), random_model("both")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("tdmpc2.inference.compiled.PATIENCE", 0.0)
    tracing = Tracing()
    if not compiler:
        monkeypatch.setattr("tdmpc2.inference.ahead.library", tracing)

    def plan(model: WorldModel, batch: int, compute: ComputeConfig) -> Plan:
        z, task, mean = latents(model, batch)
        if compute.compile:  # a process may have another default dtype
            torch.set_default_dtype(torch.float64)
        try:
            return Planner(model, BUDGET, DISCOUNT, NoiseSource(4), compute).plan(z, mean, task=task)
        finally:
            torch.set_default_dtype(torch.float32)

    for batch in (2, 5, 3, 16) if compiler else (2, 5, 1, 3, 16):
        compiled = plan(models[batch % 2], batch, ComputeConfig(compile=True))
        eager = plan(models[0], batch, ComputeConfig())
        for x, y in zip(compiled, eager, strict=True):
            torch.testing.assert_close(x, y, atol=1e-3, rtol=1e-3)  # dtypes too
    if compiler:
        assert len(list((tmp_path / "tdmpc2").iterdir())) == 1
        assert "compiling the planner" in capsys.readouterr().err
    else:
        assert len(tracing.made) == 2


def score(weights: FollowedWeights, batch: int = 4) -> Tensor:
    generator, model = torch.Generator().manual_seed(0), weights.model
    c = model.config
    z = model.encode(torch.randn(batch, *c.obs_shape, generator=generator))
    actions = torch.rand(batch, 3, 200, c.action_dim, generator=generator) * 2 - 1
    noise = torch.randn(batch, 200, c.action_dim, generator=generator)
    centre = actions.mean(2, keepdim=True)
    fast = FastModel(c, 0.99, weights.dtype)
    return fast.score(origin(model, z), actions, centre, noise, torch.tensor([0, 1]), weights())


def test_bfloat16_values_are_close() -> None:
    official = Path(__file__).parent / "fixtures" / "official" / "state_small.pt"
    model = load_world_model(official)
    exact, rounded = (score(FollowedWeights(model, dtype)) for dtype in (torch.float32, torch.bfloat16))
    assert exact.dtype == rounded.dtype == torch.float32
    error = (exact - rounded).square().mean().sqrt()
    assert 0 < error < 0.1 * exact.std(1).mean()
    top, top_rounded = (set(x[0].topk(20).indices.tolist()) for x in (exact, rounded))
    assert len(top & top_rounded) >= 14


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_planning_follows_the_weights_of_a_model_in_training(dtype: torch.dtype) -> None:
    model = random_model("plain").requires_grad_(True)
    weights = FollowedWeights(model, dtype)
    with torch.no_grad():
        before = score(weights)
    assert weights() is weights(), "nothing changed, nothing to copy"
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    model.reward(model.encode(torch.ones(2, 5)), torch.ones(2, 3)).sum().backward()
    optimizer.step()
    with torch.no_grad():
        after, fresh = score(weights), score(FollowedWeights(model, dtype))
    assert torch.equal(after, fresh)
    assert not torch.equal(after, before)


def test_unknown_precision_is_refused() -> None:
    with pytest.raises(ConfigError, match="float32"):
        Planner(random_model("plain"), BUDGET, 0.99, NoiseSource(0), ComputeConfig("float16"))


@pytest.mark.parametrize("has", [True, False])
def test_a_processor_without_bfloat16_is_said_once(
    has: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "avx512_bf16": has})
    compiled._say_slow.cache_clear()
    cpu = torch.device("cpu")
    assert compiled.dtype_of(ComputeConfig("float32"), cpu) == torch.float32
    assert not capsys.readouterr().err
    for _ in range(2):
        assert compiled.dtype_of(ComputeConfig("bfloat16"), cpu) == torch.bfloat16
    assert capsys.readouterr().err.count("has no instructions for bfloat16") == (not has)


@pytest.mark.parametrize("has", [True, False])
def test_automatic_precision_is_bfloat16_where_the_processor_has_it(
    has: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tdmpc2.inference.compiled.computes_in_bfloat16", lambda: has)
    planner = Planner(random_model("plain"), BUDGET, 0.99, NoiseSource(0), ComputeConfig("auto"))
    assert planner.compute.precision == ("bfloat16" if has else "float32")
    assert planner.iteration.fast.dtype == (torch.bfloat16 if has else torch.float32)
    pinned = Planner(random_model("plain"), BUDGET, 0.99, NoiseSource(0), ComputeConfig("float32"))
    assert pinned.compute.precision == "float32"
