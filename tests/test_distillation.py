"""Distillation: shards, collecting, replayed stretches against the agent, losses, training."""

import csv
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor

from tdmpc2 import load_world_model
from tdmpc2.agent import TDMPC2, SpeculativeAgent
from tdmpc2.config import EAGER, TEACHER, CorrectorConfig, PlannerConfig, SpeculationConfig
from tdmpc2.corrector import BaseCorrector, History, build_corrector, load_corrector, read_header
from tdmpc2.distillation import CorrectorTrainConfig, collect, error_table, load_shards, train_corrector
from tdmpc2.distillation.collect import BURST_EVERY, BURST_STEPS, Bursts
from tdmpc2.distillation.dataset import Recording, episode_bounds, read_shard, split_starts, write_shard
from tdmpc2.distillation.losses import Unrolled, correction_loss, distance, unroll
from tdmpc2.errors import ConfigError, DataError, TDMPC2Error
from tdmpc2.evaluation.rollout import measure_latency, random_returns, rollout
from tdmpc2.files import LOCK, in_use
from tdmpc2.planner import Plan
from tdmpc2.progress import Progress
from tdmpc2.teacher import Teacher
from tdmpc2.workers import Workers
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


class Drifting(Teacher):
    """A teacher on that system."""

    env_class: type[Drift] = Drift

    def env(self) -> gym.Env:
        return self.env_class()


@pytest.fixture(scope="module")
def teacher(model: WorldModel) -> Drifting:
    return Drifting("drift", model, BUDGET, 0.99, fingerprint(model), None, EAGER)


def make_corrector(model: WorldModel, architecture: str) -> BaseCorrector:
    """A corrector that has something to say."""
    torch.manual_seed(3)
    config = CorrectorConfig(model.config.latent_dim, ACTION, architecture, width=32, window=5, num_heads=2)
    corrector = build_corrector(config).eval()
    torch.nn.init.normal_(corrector.gate.weight, std=0.2)
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
    label = torch.rand(n, ACTION, generator=generator) * 2 - 1
    if answer is not None:
        label = answer(latent)
    ends = torch.zeros(n, dtype=torch.uint8)
    ends[torch.tensor(lengths).cumsum(0) - 1] = 1
    first, last = episode_bounds(ends)
    recording = Recording(
        latent=latent,
        plan=plan,
        drawn=torch.zeros(n, ACTION),
        teacher_action=label,
        first=first,
        last=last,
        seed=torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)),
        teacher=fingerprint(model),
    )
    return recording, obs


# --- shards


@pytest.fixture(scope="module")
def shards(teacher: Drifting, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "within"
    collect(teacher, folder, episodes=5, seed=40, num_envs=2)
    return folder


def test_shards_hold_whole_episodes_with_labels(shards: Path, model: WorldModel) -> None:
    paths = sorted(shards.glob("*.safetensors"))
    assert [p.name for p in paths] == [f"shard-000000{s}.safetensors" for s in (40, 42, 44)]
    seen = set()
    for path, seeds in zip(paths, ([40, 41], [42, 43], [44]), strict=True):
        tensors, header = read_shard(path, fingerprint(model))
        assert header["task"] == "drift" and header["seeds"] == seeds
        assert header["planner"]["num_samples"] == 16
        # The recorded actions, executed again, lead to the recorded latents, rewards and ends.
        latents, rewards, ends = [], [], []
        actions = iter(tensors["action"])
        for seed in seeds:
            env, end = Drift(), 0
            obs, _ = env.reset(seed=seed)
            while not end:
                latents.append(torch.from_numpy(obs))
                obs, reward, terminated, truncated, _ = env.step(next(actions).numpy())
                end = 2 if terminated else int(truncated)
                rewards.append(reward)
                ends.append(end)
        assert next(actions, None) is None
        assert tensors["episode_end"].tolist() == ends
        torch.testing.assert_close(tensors["reward"], torch.tensor(rewards))
        torch.testing.assert_close(tensors["latent"], model.encode(torch.stack(latents)))
        assert torch.equal(tensors["action"], tensors["drawn"])  # the teacher acted
        assert not torch.equal(tensors["action"], tensors["plan"][:, 0])  # plans are the mean
        seen.update(ends)
    assert seen == {0, 1, 2}


def test_progress_counts_the_steps_that_there_are(teacher: Drifting, shards: Path, tmp_path: Path) -> None:
    """Those of the missing shards; episodes may end before the limit."""
    shutil.copy(shards / "shard-00000040.safetensors", tmp_path)
    shown = Console(file=StringIO(), width=200)
    with Progress(shown) as progress:
        paths = collect(teacher, tmp_path, episodes=5, seed=40, num_envs=2, workers=Workers(1, progress))
    steps = [len(read_shard(path)[0]["reward"]) for path in paths[1:]]
    assert f"collecting: {sum(steps)} of {sum(steps)} steps" in shown.file.getvalue()  # type: ignore[attr-defined]


def test_load_shards_reads_all_folders_within(shards: Path, model: WorldModel) -> None:
    data = load_shards(shards.parent, fingerprint(model))
    lengths = [len(read_shard(p)[0]["reward"]) for p in sorted(shards.glob("*.safetensors"))]
    assert len(data.latent) == sum(lengths) == len(data.first) == len(data.last)
    assert len(data.first.unique()) == 5


def test_damaged_and_foreign_shards_are_refused(
    shards: Path, tmp_path: Path, model: WorldModel, teacher: Drifting
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
        collect(teacher, tmp_path, episodes=2, seed=40, num_envs=2)
    save_file(load_file(shards / name), tmp_path / name, metadata={"older-data-0": "{}"})
    with pytest.raises(DataError, match="something else: delete it and collect it again"):
        load_shards(tmp_path, fingerprint(model))


def longer(tensor: Tensor) -> Tensor:
    return torch.cat([tensor, tensor[-1:]])


@pytest.mark.parametrize(
    ("header", "tensors", "fault"),
    [
        ({"seeds": None}, {}, "its header has no seeds"),
        ({"seeds": ["x", "y"]}, {}, "distinct whole numbers"),
        ({"seeds": [True, 2]}, {}, "distinct whole numbers"),
        ({"seeds": [2**70, 1]}, {}, "distinct whole numbers"),
        ({"seeds": [40, 40]}, {}, "distinct whole numbers"),
        ({"seeds": [40]}, {}, "2 episodes and 1 seeds"),
        ({"planner": []}, {}, "its header has no planner"),
        ({"task_index": True}, {}, "its header has no task_index"),
        ({"teacher": 5}, {}, "its header has no teacher"),
        ({}, {"reward": None}, "it holds action"),
        ({}, {"latent": Tensor.bfloat16}, "its latent is torch.bfloat16"),
        ({}, {"episode_end": Tensor.float}, "its episode_end is torch.float32"),
        ({}, {"plan": lambda x: x[:, 0]}, "its plan is"),
        ({}, {"reward": longer}, "its reward is"),
        ({}, {"action": lambda x: x[:, 1:]}, "its action is"),
        ({}, {"episode_end": lambda x: x * 0}, "0 episodes and 2 seeds"),
        ({}, {"episode_end": lambda x: x.roll(1)}, "2 episodes and 2 seeds"),
        ({}, {"latent": lambda x: x * torch.nan}, "its latent is not finite"),
    ],
)
def test_shards_with_wrong_contents_are_refused(
    shards: Path, tmp_path: Path, model: WorldModel, header: dict, tensors: dict, fault: str
) -> None:
    """Their digest is right: somebody wrote them so."""
    name = "shard-00000040.safetensors"
    right, about = read_shard(shards / name)
    for key, change in tensors.items():
        if change is None:
            del right[key]
        else:
            right[key] = change(right[key])
    write_shard(tmp_path / name, right, {**about, **header})
    with pytest.raises(DataError, match=f"{name} is damaged, .*{fault}.*: delete it and collect it again"):
        load_shards(tmp_path, fingerprint(model))


@pytest.mark.parametrize("header", [[1], "x", {"task": "drift"}])
def test_shards_whose_header_is_something_else_are_refused(
    shards: Path, tmp_path: Path, model: WorldModel, header: object
) -> None:
    name = "shard-00000040.safetensors"
    save_file(load_file(shards / name), tmp_path / name, metadata={"tdmpc2": json.dumps(header)})
    with pytest.raises(DataError, match="damaged or something else"):
        load_shards(tmp_path, fingerprint(model))


def test_shards_of_different_shapes_do_not_mix(shards: Path, tmp_path: Path, model: WorldModel) -> None:
    right, about = read_shard(shards / "shard-00000040.safetensors")
    for first, tensors in ((40, right), (90, {**right, "latent": right["latent"][:, 1:]})):
        write_shard(
            tmp_path / f"shard-{first:08d}.safetensors", tensors, {**about, "seeds": [first, first + 1]}
        )
    with pytest.raises(DataError, match="differ: shapes="):
        load_shards(tmp_path, fingerprint(model))


def test_shards_of_pixels_hold_no_frames(tmp_path: Path) -> None:
    """Three frames of 64 times 64 pixels would be 37 kB a step."""
    model = load_world_model(Path(__file__).parent / "fixtures" / "official" / "rgb_small.pt")
    shape = model.config.obs_shape

    class Film(Drift):
        observation_space = Box(0, 255, shape, np.uint8)
        action_space = Box(-1, 1, (model.config.action_dim,), np.float32)

        def reset(self, **options: Any) -> tuple[np.ndarray, dict]:
            _, info = super().reset(**options)
            return self.np_random.integers(0, 256, shape).astype(np.uint8), info

        def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
            _, *happened = super().step(action)
            return self.np_random.integers(0, 256, shape).astype(np.uint8), *happened

    teacher = Drifting("film", model, BUDGET, 0.99, fingerprint(model), None, EAGER)
    object.__setattr__(teacher, "env_class", Film)
    (path,) = collect(teacher, tmp_path, episodes=1)
    tensors, _ = read_shard(path)
    assert path.stat().st_size < 4096 * len(tensors["reward"])


def test_shards_of_different_budgets_do_not_mix(teacher: Drifting, shards: Path, tmp_path: Path) -> None:
    bigger = PlannerConfig(**{**vars(BUDGET), "num_samples": 24})
    collect(teacher, tmp_path / "a", episodes=1)
    collect(replace(teacher, planner=bigger), tmp_path / "b", episodes=1)
    with pytest.raises(
        DataError, match=r"differ: planner\.num_samples=16, not 24; collect them into folders of"
    ):
        load_shards(tmp_path, fingerprint(teacher.model))


# --- collecting


class KilledError(Exception):
    pass


def test_resumed_collecting_equals_uninterrupted(teacher: Drifting, tmp_path: Path) -> None:
    corrector = make_corrector(teacher.model, "temporal")
    options: dict[str, Any] = {
        "episodes": 5,
        "num_envs": 2,
        "behaviours": [SpeculationConfig(3, corrector="c"), TEACHER],
        "correctors": {"c": corrector},
    }
    collect(teacher, tmp_path / "whole", **options)

    steps = 0

    class Dying(Drift):
        def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
            nonlocal steps
            steps += 1
            if steps == 22:
                raise KilledError
            return super().step(action)

    dying = replace(teacher)
    object.__setattr__(dying, "env_class", Dying)
    killed = tmp_path / "killed"
    with pytest.raises(KilledError):
        collect(dying, killed, **options)
    before = {p.name: p.read_bytes() for p in killed.glob("*.safetensors")}
    assert 1 <= len(before) < 3
    paths = collect(teacher, killed, **options)
    assert len(paths) == 3
    for path in paths:
        assert path.read_bytes() == (tmp_path / "whole" / path.name).read_bytes()
    assert before.items() <= {p.name: p.read_bytes() for p in killed.glob("*.safetensors")}.items()

    with pytest.raises(DataError, match="behaviours"):  # other settings, same folder
        collect(teacher, killed, episodes=5, num_envs=2)
    corrector.gate.weight.data *= 2
    with pytest.raises(DataError, match="behaviours"):  # the same settings, another corrector
        collect(teacher, killed, **options)


def test_behaviours_drive_the_episodes_and_the_teacher_labels_them(teacher: Drifting, tmp_path: Path) -> None:
    naive = SpeculationConfig(execution_horizon=2)
    (path,) = collect(teacher, tmp_path, episodes=2, num_envs=2, behaviours=[TEACHER, naive])
    tensors, _ = read_shard(path)
    first, _ = episode_bounds(tensors["episode_end"])
    plans, action = tensors["plan"], tensors["action"]
    for i in range(len(first)):
        t, taught = i - int(first[i]), first[i] == 0
        expected = tensors["drawn"][i] if taught else plans[i, 0] if t % 2 == 0 else plans[i - 1, 1]
        assert torch.equal(action[i], expected)


def test_episodes_take_the_behaviours_in_turn_whatever_shard_they_are_in(
    teacher: Drifting, tmp_path: Path
) -> None:
    """Three behaviours, two episodes a shard: the third drives the first episode of the second shard."""
    behaviours = [TEACHER, SpeculationConfig(execution_horizon=2), SpeculationConfig(execution_horizon=3)]
    paths = collect(teacher, tmp_path, episodes=4, num_envs=2, behaviours=behaviours)
    horizons = []
    for path in paths:
        tensors, _ = read_shard(path)
        for start in episode_bounds(tensors["episode_end"])[0].unique().tolist():
            plan, action = tensors["plan"][start:], tensors["action"][start : start + 3]
            executed = {
                1: tensors["drawn"][start : start + 3],
                2: torch.stack([plan[0, 0], plan[0, 1], plan[2, 0]]),
                3: plan[0],
            }
            horizons += [k for k, expected in executed.items() if torch.equal(action, expected)]
    assert horizons == [1, 2, 3, 1]


def test_bursts_are_the_seeds_own_and_short() -> None:
    bursts = [Bursts(7) for _ in range(2)]
    action = torch.full((2,), 5.0)
    first, second = (torch.stack([b(action) for _ in range(5000)]) for b in bursts)
    assert torch.equal(first, second)
    random = (first != 5.0).all(1)
    assert torch.equal(random, (first != 5.0).any(1)) and first[random].abs().max() <= 1
    expected = (1 + BURST_STEPS) / 2 / BURST_EVERY
    assert 0.5 * expected < random.float().mean() < 1.5 * expected


def test_random_actions_are_executed_and_labelled(teacher: Drifting, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(Bursts.__call__.__globals__, "BURST_EVERY", 1)  # one after another
    (path,) = collect(teacher, tmp_path, episodes=1, bursts=True)
    tensors, header = read_shard(path)
    burst = Bursts(0)
    assert header["bursts"]
    assert torch.equal(tensors["action"], torch.stack([burst(a) for a in tensors["action"]]))
    assert (tensors["action"] != tensors["drawn"]).all()
    assert tensors["plan"].abs().sum() > 0


def test_impossible_collecting_is_refused(teacher: Drifting, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such corrector"):
        behaviours = [SpeculationConfig(corrector="two_tower")]
        collect(teacher, tmp_path, episodes=1, behaviours=behaviours)
    for mistake in ({"episodes": 0}, {"episodes": 1, "num_envs": 0}, {"episodes": 1, "seed": -1}):
        with pytest.raises(ConfigError, match="seed at least 0"):
            collect(teacher, tmp_path / "out", **mistake)  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_behaviours_with_thresholds_go_on(teacher: Drifting, tmp_path: Path) -> None:
    """JSON makes lists of tuples; that is no other setting."""
    behaviour = SpeculationConfig(execution_horizon=2, threshold=(0.5, 1.0))
    for _ in range(2):
        collect(teacher, tmp_path, episodes=1, behaviours=[behaviour])
    with pytest.raises(DataError, match=r"behaviours=.*choose another folder"):
        collect(teacher, tmp_path, episodes=1, behaviours=[replace(behaviour, threshold=(0.5,))])


@pytest.mark.parametrize("fails", ["in the second environment", "in a step"])
def test_environments_are_closed_when_one_fails(teacher: Drifting, tmp_path: Path, fails: str) -> None:
    made: list[Drift] = []
    closed: list[Drift] = []

    class Failing(Drift):
        def __init__(self) -> None:
            if len(made) and fails == "in the second environment":
                raise KilledError
            made.append(self)

        def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
            raise KilledError

        def close(self) -> None:
            closed.append(self)

    failing = replace(teacher)
    object.__setattr__(failing, "env_class", Failing)
    two, one = (SpeculativeAgent(failing.agent(n), TEACHER) for n in (2, 1))
    with pytest.raises(KilledError):
        collect(failing, tmp_path, episodes=2)
    assert made and sorted(map(id, closed)) == sorted(map(id, made))
    for run in (
        lambda: rollout(two, failing.env, [0, 1]),
        lambda: random_returns(failing.env, [0, 1]),
        lambda: measure_latency({"a": one, "b": one}, failing.env, 0, 3),
    ):
        made.clear()
        closed.clear()
        with pytest.raises(KilledError):
            run()
        assert made and sorted(map(id, closed)) == sorted(map(id, made))


@pytest.mark.parametrize("work", ["collecting", "training"])
def test_a_folder_in_use_is_left_alone(teacher: Drifting, tmp_path: Path, work: str) -> None:
    data, _ = make_recording(teacher.model, [4, 4, 4])
    with in_use(tmp_path), pytest.raises(ConfigError, match="in use by another process"):
        if work == "collecting":
            collect(teacher, tmp_path, episodes=1)
        else:
            train_corrector(teacher.model, data, CorrectorTrainConfig(updates=1), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [LOCK]


# --- stretches


def test_episode_bounds() -> None:
    first, last = episode_bounds(torch.tensor([0, 0, 1, 2, 0, 1], dtype=torch.uint8))
    assert first.tolist() == [0, 0, 0, 3, 4, 4]
    assert last.tolist() == [2, 2, 2, 3, 5, 5]


def test_split(model: WorldModel) -> None:
    data, _ = make_recording(model, [3, 1, 4, 2, 2, 3, 3])  # seeds 0 to 6
    train, validation, test = (share.tolist() for share in split_starts(data, 5))
    assert test == [0, 1, 12, 13]  # seeds 0 and 5; an episode's last step starts nothing
    assert validation == [15, 16]  # seed 6; seed 1 is one step long
    assert train == [4, 5, 6, 8, 10]
    # Where no seed would be held out, two are all the same.
    shares = split_starts(data._replace(seed=data.seed * 10 + 2), 5)
    assert [share.tolist() for share in shares] == [[8, 10, 12, 13, 15, 16], [4, 5, 6], [0, 1]]
    # Where one of the two is missing, the other stays: what was trained on is not the test's later.
    data, _ = make_recording(model, [2, 2, 2])
    shares = split_starts(data._replace(seed=data.seed + 3), 5)  # seeds 3, 4 and 5
    assert [share.tolist() for share in shares] == [[2], [0], [4]]
    with pytest.raises(DataError, match="2 episodes were collected, and 2 of them"):
        few, _ = make_recording(model, [3, 3])
        split_starts(few, 5)
    with pytest.raises(DataError, match="3 episodes were collected, and 0 of them have at least two steps"):
        short, _ = make_recording(model, [1, 1, 1])
        split_starts(short, 5)


def test_later_data_leaves_the_split(teacher: Drifting, tmp_path: Path) -> None:
    """Rounds sort before the teacher's own episodes, and still move nobody from one share to another."""
    collect(teacher, tmp_path / "teacher", episodes=6, seed=40)
    seeds = [set(s.tolist()) for s in shares_by_seed(tmp_path, teacher)]
    collect(teacher, tmp_path / "round-1", episodes=6, seed=46)
    later = [set(s.tolist()) for s in shares_by_seed(tmp_path, teacher)]
    assert all(before <= after for before, after in zip(seeds, later, strict=True))
    assert sum(map(len, later)) == 12
    collect(teacher, tmp_path / "again", episodes=1, seed=47)
    with pytest.raises(DataError, match="another shard has too"):
        load_shards(tmp_path, teacher.fingerprint)


def shares_by_seed(folder: Path, teacher: Drifting) -> list[Tensor]:
    data = load_shards(folder, teacher.fingerprint)
    return [data.seed[share].unique() for share in split_starts(data, 5)]


@pytest.mark.parametrize("architecture", ["two_tower", "temporal"])
@pytest.mark.parametrize("earlier", [2, 3, 4, 5])  # with 5, the window begins inside a plan
def test_replayed_stretch_is_what_the_agent_does(model: WorldModel, architecture: str, earlier: int) -> None:
    """The agent executes plans of `earlier` steps, then one of 6: the stretch feeds the same, unrefined."""
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
                agents[6]._now = agent._now
                agent = agents[6]
                agent._now.k[:] = 6
            plan = Plan(*[data.plan[t : t + 1]] * 2, *[torch.zeros(1)] * 2)
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
        plan=spoil(data.plan),
        teacher_action=spoil(data.teacher_action),
    )
    a = unroll(model, corrector, data, start, earlier, 6)
    b = unroll(model, corrector, rubbish, start, earlier, 6)
    assert a.inside.sum(0).tolist() == [6, 5, 4, 3, 2, 1, 0]
    torch.testing.assert_close(a.action[a.inside], b.action[b.inside])
    torch.testing.assert_close(correction_loss(a, 0.1, "l1"), correction_loss(b, 0.1, "l1"))
    inside = data._replace(latent=data.latent.roll(1, 0))
    c = unroll(model, corrector, inside, start, earlier, 6)
    assert not torch.allclose(a.action[a.inside], c.action[c.inside])  # the test can fail


@torch.no_grad()
@pytest.mark.parametrize("loss", ["l1", "mse"])
def test_rollout_loss_by_hand(model: WorldModel, loss: str) -> None:
    """One stretch of four corrected steps, two of them within the planning horizon."""
    corrector = make_corrector(model, "two_tower")
    data, _ = make_recording(model, [9])
    z_pred = model.next(data.latent[2], data.plan[2, 0])
    total = 0.0
    for k in (1, 2, 3, 4):
        z = data.latent[2 + k]
        planned = data.plan[2, k] if k < HORIZON else model.pi(z).mean
        x = [v[None] for v in (z, z_pred, z - z_pred, planned)]
        hidden = [corrector.real(x[0]), corrector.predicted(x[1]), corrector.difference(x[2])]  # type: ignore[operator]
        step = corrector.step(torch.tensor([k]))  # type: ignore[operator]
        hidden = corrector.trunk(torch.cat([*hidden, step, x[3]], -1))  # type: ignore[operator]
        delta = corrector.gate(hidden).tanh() * (corrector.own(hidden) - planned)
        action = (planned + delta[0]).clamp(-1, 1)
        missed = action - data.teacher_action[2 + k]
        total += float(missed.abs().sum() if loss == "l1" else missed.square().sum())
        total += 0.3 * float((action - planned).square().sum())
        z_pred = model.next(z_pred, action)
    u = unroll(model, corrector, data, torch.tensor([2]), torch.tensor([1]), 4)
    assert float(correction_loss(u, 0.3, loss)) == pytest.approx(total / 4, rel=1e-5)


@pytest.mark.parametrize(("loss", "expected"), [("l1", (1 + 2 + 7) / 3), ("mse", (1 + 4 + 25) / 3)])
def test_a_loss_is_the_mean_over_the_steps_inside_their_episodes(loss: str, expected: float) -> None:
    action = torch.tensor([[[1.0, 0.0], [0.0, 2.0]], [[3.0, 4.0], [9.0, 9.0]]])  # [S, B, A]
    inside = torch.tensor([[True, True], [True, False]])
    u = Unrolled(action, planned=action - 1, teacher=torch.zeros(2, 2, 2), inside=inside)
    assert float(correction_loss(u, 0.0, loss)) == pytest.approx(expected)
    assert float(correction_loss(u, 0.1, loss)) == pytest.approx(expected + 0.1 * 2)
    assert distance(action, u).tolist() == [1.5, 7.0]


@torch.no_grad()
def test_plan_driven_stretch_follows_the_plan(model: WorldModel) -> None:
    corrector = make_corrector(model, "two_tower")
    data, _ = make_recording(model, [9])
    one, start = torch.tensor([1]), torch.tensor([2])
    u = unroll(model, corrector, data, start, one, 4, own_actions=False)
    torch.testing.assert_close(u.planned[:2, 0], data.plan[2, 1:])
    torch.testing.assert_close(u.planned[2:, 0], model.pi(data.latent[5:7]).mean)
    predicted = [model.next(data.latent[2], data.plan[2, 0])]
    for planned in u.planned[:3, 0]:
        predicted.append(model.next(predicted[-1], planned))
    z_pred = torch.stack(predicted)
    k, valid = torch.arange(1, 5), torch.ones(4, dtype=torch.bool)
    seen = History(corrector.embed(data.latent[3:7], z_pred, u.planned[:, 0], k)[:, None], valid[:, None])
    torch.testing.assert_close(u.action[:, 0], corrector(seen, u.planned[:, 0]))


# --- training


def answer(latent: Tensor) -> Tensor:
    """A teacher whose action is a function of the state."""
    generator = torch.Generator().manual_seed(9)
    weight = torch.randn(latent.shape[-1], ACTION, generator=generator)
    return (3 * (latent - latent.mean(0)) @ weight).tanh()


@pytest.mark.parametrize("architecture", ["two_tower", "temporal"])
def test_training_beats_the_plan_on_held_out_episodes(
    model: WorldModel, architecture: str, tmp_path: Path
) -> None:
    data, _ = make_recording(model, [40] * 12, answer)
    config = CorrectorTrainConfig(
        architecture=architecture, updates=60, batch_size=32, rollout_steps=3, width=32, window=3,
        num_heads=2, validate_every=20, lr=1e-2,
    )  # fmt: skip
    shown = Console(file=StringIO(), width=200)
    with Progress(shown) as progress:
        everything = train_corrector(model, data, config, tmp_path, progress=progress)
    trained = everything[architecture]
    errors = trained.errors
    assert len(errors.corrector) == len(errors.plan) == len(errors.prior) == 3
    assert sum(errors.corrector) < 0.5 * sum(errors.plan)
    assert sum(errors.corrector) < 0.5 * sum(errors.prior)
    # The file on disk is that corrector.
    loaded = load_corrector(tmp_path / architecture, fingerprint(model))
    for name, weight in trained.corrector.state_dict().items():
        assert torch.equal(weight, loaded.state_dict()[name])
    assert read_header(tmp_path / architecture)["errors"] == errors._asdict()
    with open(tmp_path / architecture / "train.csv") as file:
        assert [row["update"] for row in csv.DictReader(file)] == ["20", "40", "60"]
    progress.table(error_table(everything))
    printed = shown.file.getvalue()  # type: ignore[attr-defined]
    assert f"training {architecture}: 60 of 60 updates, error " in printed
    assert f"{sum(errors.corrector) / 3:.4f}" in printed and "policy prior" in printed


def test_the_loss_decides_what_is_learnt_and_the_errors_compare(model: WorldModel, tmp_path: Path) -> None:
    """Where the teacher takes one end twice and the other once, the square's best answer lies between."""
    data, _ = make_recording(model, [30] * 6)
    often = torch.ones_like(data.teacher_action)
    often[torch.arange(len(often)) % 3 == 0] = -1.0
    data = data._replace(teacher_action=often, latent=data.latent[:1].expand_as(data.latent).contiguous())
    config = CorrectorTrainConfig(
        architecture="distilled", updates=80, rollout_steps=2, width=16, num_heads=2, lr=3e-2,
        residual_coef=0.0,
    )  # fmt: skip
    answers, errors = {}, {}
    for loss in ("l1", "mse"):
        name = tmp_path / loss
        corrector, found = train_corrector(model, data, replace(config, loss=loss), name)["distilled"]
        u = unroll(model, corrector, data, torch.tensor([1]), torch.tensor([1]), 1)
        answers[loss], errors[loss] = float(u.action.mean()), sum(found.corrector) / 2
    assert answers["l1"] > 0.9 and abs(answers["mse"] - 1 / 3) < 0.2
    # Both are L1 distances of six actions: 2 / 3 of all where the end is right, 8 / 9 between.
    assert errors["l1"] == pytest.approx(6 * 2 / 3, abs=0.5) and errors["mse"] == pytest.approx(
        6 * 8 / 9, abs=0.5
    )


def test_reported_errors_are_those_of_the_test_episodes(model: WorldModel, tmp_path: Path) -> None:
    data, _ = make_recording(model, [4, 5, 6])  # seed 0 is for the test
    config = CorrectorTrainConfig(architecture="two_tower", updates=1, rollout_steps=2, width=16, num_heads=2)
    errors = train_corrector(model, data, config, tmp_path)["two_tower"].errors

    def distance(action: Tensor, steps: slice) -> float:
        return float((action - data.teacher_action[steps]).abs().sum(-1).mean())

    ahead = [slice(1, 4), slice(2, 4)]  # of starts 0, 1, 2, those inside at k = 1 and k = 2
    plan = [distance(data.plan[0:3, 1], ahead[0])]
    plan.append(distance(data.plan[0:2, 2], ahead[1]))
    assert errors.plan == pytest.approx(plan)
    prior = [distance(model.pi(data.latent[s]).mean, s) for s in ahead]
    assert errors.prior == pytest.approx(prior)


def test_training_stops_early_and_keeps_the_best(model: WorldModel, tmp_path: Path) -> None:
    data, _ = make_recording(model, [30] * 5, answer)
    label = torch.rand(150, ACTION, generator=torch.Generator().manual_seed(1)) * 2 - 1
    noisy = torch.arange(150)[:, None] >= 60  # all training episodes: the longer, the more is learnt by heart
    data = data._replace(teacher_action=torch.where(noisy, label, data.teacher_action))
    config = CorrectorTrainConfig(
        architecture="two_tower", updates=400, batch_size=16, rollout_steps=2, width=32,
        num_heads=2, validate_every=5, patience=2, lr=1e-2,
    )  # fmt: skip
    trained = train_corrector(model, data, config, tmp_path)["two_tower"]
    with open(tmp_path / "two_tower" / "train.csv") as file:
        errors = [float(row["validation_error"]) for row in csv.DictReader(file)]
    assert 3 <= len(errors) < 80
    assert errors.index(min(errors)) == len(errors) - 3
    again = train_corrector(model, data, config, tmp_path / "again")["two_tower"]
    assert again.errors == trained.errors  # the seed decides
    other = train_corrector(model, data, replace(config, seed=1), tmp_path / "other")["two_tower"]
    assert other.errors != trained.errors
    still = replace(config, updates=1, lr=1e-12)
    went_on = train_corrector(model, data, still, tmp_path / "on", {"two_tower": trained.corrector})
    assert went_on["two_tower"].errors.corrector == pytest.approx(trained.errors.corrector)


def test_what_is_worse_than_the_plan_is_not_kept(model: WorldModel, tmp_path: Path) -> None:
    """Where the plan is the teacher's answer already, the untrained corrector is the best."""
    data, _ = make_recording(model, [30] * 5)
    label = data.plan[:, 1].roll(1, 0)  # right at k = 1, as planned one step before
    config = CorrectorTrainConfig(
        architecture="two_tower", updates=3, rollout_steps=1, width=32, validate_every=1, lr=1.0
    )
    errors = train_corrector(model, data._replace(teacher_action=label), config, tmp_path)["two_tower"].errors
    assert errors.corrector == errors.plan == [pytest.approx(0.0, abs=1e-12)]


def test_episodes_shorter_than_a_stretch(model: WorldModel, tmp_path: Path) -> None:
    """Errors are of the steps that there are: the longest held-out episode has 3 after its first."""
    data, _ = make_recording(model, [4, 3, 6, 5])  # seed 0 is for the test, seed 1 for validation
    config = CorrectorTrainConfig(architecture="two_tower", updates=1, rollout_steps=9, width=32)
    errors = train_corrector(model, data, config, tmp_path)["two_tower"].errors
    assert all(len(values) == 3 and np.isfinite(values).all() for values in errors)


def test_judged_are_every_so_many_starts(model: WorldModel, tmp_path: Path) -> None:
    """Of 512 held-out starts every second; the only one with two steps after it is not among them."""
    held_out = [2, 3, *[2] * 509]  # steps
    lengths = [*held_out, *held_out, 4, 4]
    data, _ = make_recording(model, lengths)
    seed = torch.tensor([0] * 511 + [1] * 511 + [2, 3])  # for the test, for validation, for training
    data = data._replace(seed=seed.repeat_interleave(torch.tensor(lengths)))
    config = CorrectorTrainConfig(architecture="two_tower", updates=1, rollout_steps=9, width=16, num_heads=2)
    errors = train_corrector(model, data, config, tmp_path)["two_tower"].errors
    assert all(len(values) == 1 and np.isfinite(values).all() for values in errors)


def test_divergence_is_named_and_leaves_no_old_corrector(model: WorldModel, tmp_path: Path) -> None:
    data, _ = make_recording(model, [6] * 5)
    config = CorrectorTrainConfig(architecture="two_tower", updates=2, rollout_steps=2, width=32, num_heads=2)
    train_corrector(model, data, config, tmp_path)
    assert "errors" in read_header(tmp_path / "two_tower")
    broken = data._replace(teacher_action=torch.full_like(data.teacher_action, torch.nan))
    with pytest.raises(TDMPC2Error, match="diverged"):
        train_corrector(model, broken, config, tmp_path)
    assert "errors" not in read_header(tmp_path / "two_tower"), "not taken for a corrector that is done"


def test_impossible_training_is_refused(model: WorldModel, tmp_path: Path) -> None:
    for changes, message in (
        ({"architecture": "three_tower"}, "three_tower"),
        ({"updates": 0}, "updates=0"),
        ({"held_out_every": 2}, "at least 3"),
        ({"width": 33}, "width=33"),
        ({"loss": "huber"}, "mse, l1"),
        ({"lr": 0.0}, "lr"),
        ({"lr": float("nan")}, "lr"),
        ({"weight_decay": -1.0}, "weight_decay"),
        ({"residual_coef": float("nan")}, "residual_coef"),
    ):
        with pytest.raises(ConfigError, match=message):
            CorrectorTrainConfig(**changes)
    data, _ = make_recording(model, [8, 8, 1])
    with pytest.raises(DataError, match="3 episodes were collected, and 2 of them"):
        train_corrector(model, data, CorrectorTrainConfig(), tmp_path / "few")


def test_episodes_of_another_model_are_refused(model: WorldModel, tmp_path: Path) -> None:
    data, _ = make_recording(model, [4, 4, 4])
    for other in (
        data._replace(latent=data.latent[:, 1:]),
        data._replace(plan=data.plan[..., 1:]),
        data._replace(task=torch.tensor(0)),
    ):
        with pytest.raises(DataError, match="of another model"):
            train_corrector(model, other, CorrectorTrainConfig(updates=1), tmp_path)
