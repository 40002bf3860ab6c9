"""Distillation: shards, collecting, replayed stretches against the agent, losses, training."""

import csv
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box
from safetensors.torch import load_file, save_file
from torch import Tensor

from tdmpc2 import load_world_model
from tdmpc2.agent import TDMPC2, SpeculativeAgent
from tdmpc2.config import CorrectorConfig, PlannerConfig, SpeculationConfig
from tdmpc2.corrector import BaseCorrector, build_corrector, load_corrector
from tdmpc2.distillation import (
    TEACHER,
    CorrectorTrainConfig,
    collect,
    load_shards,
    train_corrector,
)
from tdmpc2.distillation.dataset import Recording, episode_bounds, read_shard, split_starts
from tdmpc2.distillation.losses import correction_loss, unroll
from tdmpc2.errors import ConfigError, DataError
from tdmpc2.planner import Plan
from tdmpc2.world_model import WorldModel, fingerprint

OBS, ACTION, HORIZON = 24, 6, 3
BUDGET = PlannerConfig(horizon=HORIZON, iterations=2, num_samples=16, num_elites=4, num_pi_trajs=4)


class Drift(gym.Env[np.ndarray, np.ndarray]):
    """A linear system; an episode's length, 4 to 9 steps, depends on its seed."""

    max_episode_steps = 9
    observation_space = Box(-np.inf, np.inf, (OBS,), np.float32)
    action_space = Box(-1, 1, (ACTION,), np.float32)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.t, self.length = 0, int(self.np_random.integers(4, 10))
        self.x = self.np_random.normal(size=OBS).astype(np.float32)
        return self.x, {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.t += 1
        self.x = (0.9 * self.x + np.resize(action, OBS)).astype(np.float32)
        ended = self.t == self.length
        return self.x, float(self.x.mean()), ended and self.t % 2 == 0, ended, {}


@pytest.fixture(scope="module")
def model() -> WorldModel:
    path = Path(__file__).parent / "fixtures" / "official" / "state_small.pt"
    return load_world_model(path)


@pytest.fixture(scope="module")
def teacher(model: WorldModel) -> TDMPC2:
    return TDMPC2(model, BUDGET, num_envs=1)


def make_corrector(model: WorldModel, architecture: str) -> BaseCorrector:
    """A corrector that has something to say."""
    torch.manual_seed(3)
    config = CorrectorConfig(model.config.latent_dim, ACTION, architecture, width=32, window=5, num_heads=2)
    corrector = build_corrector(config).eval()
    torch.nn.init.normal_(corrector.update.weight, std=0.2)  # type: ignore[union-attr, arg-type]
    return corrector


@torch.no_grad()
def make_recording(
    model: WorldModel, lengths: list[int], answer: Callable[[Tensor], Tensor] | None = None
) -> tuple[Recording, Tensor]:
    """Episodes of random observations and plans, and the observations `[N, obs]`.

    The teacher's action is `answer(latent)`; random without it.
    """
    generator = torch.Generator().manual_seed(5)
    n = sum(lengths)
    obs = torch.randn(n, OBS, generator=generator)
    plan = torch.rand(n, HORIZON, ACTION, generator=generator) * 1.6 - 0.8
    latent = model.encode(obs)
    predicted = [latent]
    for k in range(HORIZON):
        predicted.append(model.next(predicted[-1], plan[:, k]))
    label = torch.rand(n, ACTION, generator=generator) * 2 - 1
    if answer is not None:
        label = answer(latent)
    ends = torch.zeros(n, dtype=torch.uint8)
    ends[torch.tensor(lengths).cumsum(0) - 1] = 1
    recording = Recording(
        latent, plan, torch.stack(predicted, 1), label, *episode_bounds(ends), fingerprint(model)
    )
    return recording, obs


# --- shards


@pytest.fixture(scope="module")
def shards(teacher: TDMPC2, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    collect(teacher, "drift", Drift, folder, episodes=5, seed=40, num_envs=2)
    return folder


def test_shards_hold_whole_episodes_with_labels(shards: Path, model: WorldModel) -> None:
    paths = sorted(shards.iterdir())
    assert [p.name for p in paths] == [f"shard-000000{s}.safetensors" for s in (40, 42, 44)]
    tensors, header = read_shard(paths[0], fingerprint(model))
    assert header["task"] == "drift" and header["seeds"] == [40, 41]
    assert header["planner"]["num_samples"] == 16
    lengths = []
    for seed in (40, 41):
        env = Drift()
        env.reset(seed=seed)
        lengths.append(env.length)
    ends = tensors["episode_end"]
    assert ends.nonzero().squeeze(1).tolist() == [lengths[0] - 1, sum(lengths) - 1]
    assert [ends[lengths[0] - 1], ends[-1]] == [2 if n % 2 == 0 else 1 for n in lengths]
    # The environment's own dynamics tie obs, action and reward together.
    obs, action = tensors["obs"], tensors["action"]
    following = 0.9 * obs + action.repeat(1, OBS // ACTION)
    inner = ends == 0
    torch.testing.assert_close(following[inner], obs[1:][inner[:-1]])
    torch.testing.assert_close(following.mean(1), tensors["reward"])
    # Latents, plans and labels are of the same step.
    torch.testing.assert_close(model.encode(obs), tensors["latent"])
    torch.testing.assert_close(tensors["plan_latents"][:, 0], tensors["latent"])
    z2 = model.next(tensors["plan_latents"][:, 1], tensors["plan_actions"][:, 1])
    torch.testing.assert_close(z2, tensors["plan_latents"][:, 2])
    assert torch.equal(action, tensors["plan_actions"][:, 0])  # the teacher acted
    assert not torch.equal(action, tensors["teacher_action"])  # labels are the mean, not the draw


def test_load_shards_reads_all_folders_within(shards: Path, model: WorldModel) -> None:
    data = load_shards(shards.parent, fingerprint(model))
    lengths = [len(read_shard(p)[0]["reward"]) for p in sorted(shards.iterdir())]
    assert len(data.latent) == sum(lengths) == len(data.first) == len(data.last)
    assert len(data.first.unique()) == 5


def test_damaged_and_foreign_shards_are_refused(
    shards: Path, tmp_path: Path, model: WorldModel, teacher: TDMPC2
) -> None:
    name = "shard-00000040.safetensors"
    content = (shards / name).read_bytes()
    with pytest.raises(DataError, match=f"{name} belongs to teacher"):
        load_shards(shards, "another")
    with pytest.raises(DataError, match="no shards in"):
        load_shards(tmp_path, "another")
    flipped = bytearray(content)
    flipped[-50] ^= 1
    for damaged in (b"", content[:30], content[:-1], bytes(flipped), b"x" * 1000):
        (tmp_path / name).write_bytes(damaged)
        with pytest.raises(DataError, match=f"{name} is damaged") as error:
            load_shards(tmp_path, fingerprint(model))
        assert "\n" not in str(error.value)
    with pytest.raises(DataError, match="damaged"):  # nor is it taken for collected
        collect(teacher, "drift", Drift, tmp_path, episodes=2, seed=40, num_envs=2)
    save_file(load_file(shards / name), tmp_path / name, metadata={"older-data-0": "{}"})
    with pytest.raises(DataError, match="schema"):
        load_shards(tmp_path, fingerprint(model))


def test_shards_of_different_budgets_do_not_mix(teacher: TDMPC2, shards: Path, tmp_path: Path) -> None:
    bigger = PlannerConfig(**{**vars(BUDGET), "num_samples": 24})
    collect(teacher, "drift", Drift, tmp_path / "a", episodes=1)
    collect(TDMPC2(teacher.model, bigger), "drift", Drift, tmp_path / "b", episodes=1)
    with pytest.raises(DataError, match="planner"):
        load_shards(tmp_path, fingerprint(teacher.model))


# --- collecting


class KilledError(Exception):
    pass


def test_resumed_collecting_equals_uninterrupted(teacher: TDMPC2, tmp_path: Path) -> None:
    corrector = make_corrector(teacher.model, "temporal")
    options: dict[str, Any] = {
        "episodes": 5,
        "num_envs": 2,
        "behaviours": [SpeculationConfig(3, corrector="c"), TEACHER],
        "correctors": {"c": corrector},
    }
    collect(teacher, "drift", Drift, tmp_path / "whole", **options)

    steps = 0

    class Dying(Drift):
        def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
            nonlocal steps
            steps += 1
            if steps == 22:
                raise KilledError
            return super().step(action)

    killed = tmp_path / "killed"
    with pytest.raises(KilledError):
        collect(teacher, "drift", Dying, killed, **options)
    before = {p.name: p.read_bytes() for p in killed.iterdir()}
    assert 1 <= len(before) < 3
    paths = collect(teacher, "drift", Drift, killed, **options)
    assert len(paths) == 3
    for path in paths:
        assert path.read_bytes() == (tmp_path / "whole" / path.name).read_bytes()
    assert before.items() <= {p.name: p.read_bytes() for p in killed.iterdir()}.items()

    with pytest.raises(DataError, match="behaviours"):  # other settings, same folder
        collect(teacher, "drift", Drift, killed, episodes=5, num_envs=2)
    corrector.update.weight.data *= 2  # type: ignore[union-attr, operator]
    with pytest.raises(DataError, match="behaviours"):  # the same settings, another corrector
        collect(teacher, "drift", Drift, killed, **options)


def test_behaviours_drive_the_episodes_and_the_teacher_labels_them(teacher: TDMPC2, tmp_path: Path) -> None:
    naive = SpeculationConfig(execution_horizon=2)
    (path,) = collect(teacher, "drift", Drift, tmp_path, episodes=2, num_envs=2, behaviours=[TEACHER, naive])
    tensors, _ = read_shard(path)
    first, _ = episode_bounds(tensors["episode_end"])
    plans, action = tensors["plan_actions"], tensors["action"]
    for i in range(len(first)):
        t, taught = i - int(first[i]), first[i] == 0
        expected = plans[i, 0] if taught or t % 2 == 0 else plans[i - 1, 1]
        assert torch.equal(action[i], expected)


def test_impossible_collecting_is_refused(teacher: TDMPC2, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such corrector"):
        behaviours = [SpeculationConfig(corrector="two_tower")]
        collect(teacher, "drift", Drift, tmp_path, episodes=1, behaviours=behaviours)
    with pytest.raises(ConfigError, match="positive"):
        collect(teacher, "drift", Drift, tmp_path, episodes=0)


# --- stretches


def test_episode_bounds_and_split() -> None:
    ends = torch.tensor([0, 0, 1, 2, 0, 1], dtype=torch.uint8)
    first, last = episode_bounds(ends)
    assert first.tolist() == [0, 0, 0, 3, 4, 4]
    assert last.tolist() == [2, 2, 2, 3, 5, 5]
    blank = torch.zeros(6, 1)
    recording = Recording(blank, blank, blank, blank, first, last, "")
    train, held_out = split_starts(recording, 5)
    assert train.tolist() == [0, 1] and held_out.tolist() == [4]  # last steps start nothing
    train, held_out = split_starts(recording, 2)
    assert train.tolist() == [0, 1, 4] and held_out.tolist() == []
    with pytest.raises(DataError, match="one episode"):
        split_starts(recording._replace(first=first[:3], last=last[:3]), 5)


@pytest.mark.parametrize("architecture", ["two_tower", "temporal"])
@pytest.mark.parametrize("earlier", [2, 4])
def test_replayed_stretch_is_what_the_agent_does(model: WorldModel, architecture: str, earlier: int) -> None:
    """The agent executes plans of `earlier` steps, then one of 6: the stretch feeds the same."""
    corrector = make_corrector(model, architecture)
    lengths = [3, 16]
    data, obs = make_recording(model, lengths)
    agents = {
        n: SpeculativeAgent(TDMPC2(model, BUDGET), SpeculationConfig(n, corrector="c"), corrector)
        for n in (earlier, 6)
    }
    for start in (3, 3 + earlier, 3 + 2 * earlier):
        agent = agents[earlier]
        agent.reset()
        executed = torch.zeros_like(data.teacher_action)
        for t in range(3, start + 6):
            if t == start:  # the last plan is executed for longer
                agents[6]._history = agent._history
                agent = agents[6]
                agent._k[:] = 6
            plan = Plan(data.plan_actions[t : t + 1], *[torch.zeros(1)] * 4)
            executed[t] = agent.act(obs[t : t + 1], plan)[0]
        # Earlier corrections are taken to be the teacher's: here they are.
        taught = data._replace(teacher_action=executed)
        u = unroll(model, corrector, taught, torch.tensor([start]), torch.tensor([earlier]), 5)
        torch.testing.assert_close(u.action[:, 0], executed[start + 1 : start + 6])
        assert u.inside.all()


def test_stretches_never_cross_episodes(model: WorldModel) -> None:
    corrector = make_corrector(model, "temporal")
    data, _ = make_recording(model, [6, 7, 8])
    start = torch.arange(6, 13)  # all of the second episode
    earlier = torch.tensor([1, 2, 3, 4, 5, 6, 7])
    own = slice(6, 13)
    others = torch.ones(21, dtype=torch.bool)
    others[own] = False

    def spoil(x: Tensor) -> Tensor:
        return torch.where(others.view(-1, *[1] * (x.dim() - 1)), torch.rand_like(x), x)

    rubbish = data._replace(
        latent=spoil(data.latent),
        plan_actions=spoil(data.plan_actions),
        plan_latents=spoil(data.plan_latents),
        teacher_action=spoil(data.teacher_action),
    )
    a = unroll(model, corrector, data, start, earlier, 6)
    b = unroll(model, corrector, rubbish, start, earlier, 6)
    assert a.inside.sum(0).tolist() == [6, 5, 4, 3, 2, 1, 0]
    torch.testing.assert_close(a.action[a.inside], b.action[b.inside])
    torch.testing.assert_close(correction_loss(a, 0.1), correction_loss(b, 0.1))
    inside = data._replace(latent=data.latent.roll(1, 0))
    c = unroll(model, corrector, inside, start, earlier, 6)
    assert not torch.allclose(a.action[a.inside], c.action[c.inside])  # the test can fail


@torch.no_grad()
def test_rollout_loss_by_hand(model: WorldModel) -> None:
    """One stretch of four corrected steps, two of them within the planning horizon."""
    corrector = make_corrector(model, "two_tower")
    data, _ = make_recording(model, [9])
    z_pred = model.next(data.latent[2], data.plan_actions[2, 0])
    total = 0.0
    for k in (1, 2, 3, 4):
        planned = data.plan_actions[2, k] if k < HORIZON else model.pi(z_pred).mean
        z = data.latent[2 + k]
        x = [v[None] for v in (z, z_pred, z - z_pred, planned)]
        hidden = [corrector.real(x[0]), corrector.predicted(x[1]), corrector.difference(x[2])]  # type: ignore[operator]
        step = corrector.step(torch.tensor([k]))  # type: ignore[operator]
        hidden = corrector.trunk(torch.cat([*hidden, step, x[3]], -1))  # type: ignore[operator]
        delta = corrector.gate(hidden).sigmoid() * corrector.update(hidden)  # type: ignore[operator]
        action = (planned + delta[0]).clamp(-1, 1)
        total += float((action - data.teacher_action[2 + k]).square().sum())
        total += 0.3 * float((action - planned).square().sum())
        z_pred = model.next(z_pred, action)
    u = unroll(model, corrector, data, torch.tensor([2]), torch.tensor([1]), 4)
    assert float(correction_loss(u, 0.3)) == pytest.approx(total / 4, rel=1e-5)


@torch.no_grad()
def test_plan_driven_stretch_reads_recorded_predictions(model: WorldModel) -> None:
    corrector = make_corrector(model, "two_tower")
    data, _ = make_recording(model, [9])
    one, start = torch.tensor([1]), torch.tensor([2])
    u = unroll(model, corrector, data, start, one, 4, own_actions=False)
    torch.testing.assert_close(u.planned[:2, 0], data.plan_actions[2, 1:])
    z3 = data.plan_latents[2, 3]
    torch.testing.assert_close(u.planned[2, 0], model.pi(z3).mean)
    z4 = model.next(z3, u.planned[2, 0])
    torch.testing.assert_close(u.planned[3, 0], model.pi(z4).mean)


# --- training


def answer(latent: Tensor) -> Tensor:
    """A teacher whose action is a function of the state."""
    generator = torch.Generator().manual_seed(9)
    weight = torch.randn(latent.shape[-1], ACTION, generator=generator)
    return (3 * (latent - latent.mean(0)) @ weight).tanh()


@pytest.mark.parametrize("architecture", ["two_tower", "temporal"])
def test_training_beats_the_plan_on_held_out_episodes(
    model: WorldModel, architecture: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, _ = make_recording(model, [40] * 12, answer)
    config = CorrectorTrainConfig(
        architecture=architecture, updates=60, batch_size=32, rollout_steps=3, width=32, window=3,
        num_heads=2, validate_every=20, lr=1e-2,
    )  # fmt: skip
    trained = train_corrector(model, data, config, tmp_path)
    validation = trained[architecture].validation
    assert len(validation.corrector) == len(validation.plan) == len(validation.prior) == 3
    assert sum(validation.corrector) < 0.5 * sum(validation.plan)
    assert sum(validation.corrector) < 0.5 * sum(validation.prior)
    # The file on disk is that corrector.
    loaded = load_corrector(tmp_path / architecture, fingerprint(model))
    for name, weight in trained[architecture].corrector.state_dict().items():
        assert torch.equal(weight, loaded.state_dict()[name])
    with open(tmp_path / architecture / "train.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["update"] for row in rows] == ["20", "40", "60"]
    mean = sum(validation.corrector) / 3
    assert min(float(row["validation_error"]) for row in rows) == pytest.approx(mean)
    printed = capsys.readouterr().out
    assert f"{mean:.4f}" in printed and "policy prior" in printed


def test_validation_references_are_those_of_plan_and_prior(model: WorldModel, tmp_path: Path) -> None:
    data, _ = make_recording(model, [4, 4])
    config = CorrectorTrainConfig(architecture="two_tower", updates=1, rollout_steps=2, width=16, num_heads=2)
    validation = train_corrector(model, data, config, tmp_path)["two_tower"].validation

    def distance(action: Tensor, steps: slice) -> float:
        return float((action - data.teacher_action[steps]).square().sum(-1).mean())

    ahead = [slice(5, 8), slice(6, 8)]  # of starts 4, 5, 6, those inside at k = 1 and k = 2
    plan = [distance(data.plan_actions[4:7, 1], ahead[0])]
    plan.append(distance(data.plan_actions[4:6, 2], ahead[1]))
    assert validation.plan == pytest.approx(plan)
    prior = [distance(model.pi(data.latent[s]).mean, s) for s in ahead]
    assert validation.prior == pytest.approx(prior)


def test_training_stops_early_and_keeps_the_best(model: WorldModel, tmp_path: Path) -> None:
    data, _ = make_recording(model, [6, 6])  # random labels: nothing to learn but noise
    config = CorrectorTrainConfig(
        architecture="two_tower", updates=400, batch_size=16, rollout_steps=2, width=32,
        num_heads=2, validate_every=10, patience=2, lr=1e-2,
    )  # fmt: skip
    validation = train_corrector(model, data, config, tmp_path)["two_tower"].validation
    with open(tmp_path / "two_tower" / "train.csv") as file:
        errors = [float(row["validation_error"]) for row in csv.DictReader(file)]
    assert len(errors) < 40
    assert sum(validation.corrector) / 2 == pytest.approx(min(errors))
    assert errors.index(min(errors)) == len(errors) - 3
    again = train_corrector(model, data, config, tmp_path / "again")["two_tower"]
    assert again.validation == validation  # the seed decides
    other = train_corrector(model, data, replace(config, seed=1), tmp_path / "other")["two_tower"]
    assert other.validation != validation


def test_impossible_training_is_refused(model: WorldModel, tmp_path: Path) -> None:
    data, _ = make_recording(model, [4, 4])
    for config, message in (
        (CorrectorTrainConfig(architecture="three_tower"), "three_tower"),
        (CorrectorTrainConfig(updates=0), "positive"),
        (CorrectorTrainConfig(held_out_every=1), "at least 2"),
    ):
        with pytest.raises(ConfigError, match=message):
            train_corrector(model, data, config, tmp_path)
    data, _ = make_recording(model, [8])
    with pytest.raises(DataError, match="one episode"):
        train_corrector(model, data, CorrectorTrainConfig(), tmp_path)
