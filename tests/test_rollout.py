"""Episodes as they are always run, more seeds than environments; and the time of single steps."""

import itertools
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from stand_ins import Seeded, Silence, length

from tdmpc2.agent import TDMPC2, SpeculativeAgent
from tdmpc2.config import TEACHER, CorrectorConfig, PlannerConfig, SpeculationConfig
from tdmpc2.corrector import build_corrector
from tdmpc2.evaluation.rollout import Rollout, measure_latency, random_returns, rollout
from tdmpc2.world_model import WorldModel, load_world_model

BUDGET = PlannerConfig(num_samples=16, iterations=2, num_elites=4, num_pi_trajs=4)
SEEDS = [7, 3, 4, 6, 5]
NAIVE = SpeculationConfig(execution_horizon=2)


class Environments(list[Seeded]):
    """Makes environments, and keeps them."""

    def __call__(self) -> Seeded:
        self.append(Seeded())
        return self[-1]


@pytest.fixture(scope="module")
def model() -> WorldModel:
    return load_world_model(Path(__file__).parent / "fixtures/official/state_small.pt")


def quiet_teacher(model: WorldModel, num_envs: int) -> TDMPC2:
    teacher = TDMPC2(model, BUDGET, num_envs=num_envs)
    teacher.planner.noise = Silence()  # type: ignore[assignment]
    return teacher


def agent_of(model: WorldModel, mode: SpeculationConfig, num_envs: int) -> SpeculativeAgent:
    corrector = None
    if mode.corrector:
        torch.manual_seed(0)
        config = CorrectorConfig(model.config.latent_dim, model.config.action_dim, mode.corrector, window=5)
        corrector = build_corrector(config).eval().requires_grad_(False)
        torch.nn.init.normal_(corrector.gate.weight, std=0.2)
        torch.nn.init.normal_(corrector.own.weight, std=0.5)
    return SpeculativeAgent(quiet_teacher(model, num_envs), mode, corrector)


def test_each_row_takes_the_next_seed_when_its_episode_ends(model: WorldModel) -> None:
    envs, done = Environments(), []
    episodes, steps = rollout(agent_of(model, NAIVE, 2), envs, SEEDS, on_step=done.append)
    assert [length(s) for s in SEEDS] == [5, 6, 7, 4, 3]  # so that row 1 ends twice while 4 lasts
    assert [env.seeds for env in envs] == [[7, 4], [3, 6, 5]] and all(env.closed for env in envs)
    assert episodes["seed"].tolist() == SEEDS and list(episodes.columns[:3]) == ["seed", "return", "length"]
    assert episodes["length"].tolist() == [length(s) for s in SEEDS]
    assert episodes["terminated"].tolist() == [s % 2 == 0 for s in SEEDS]
    assert episodes["planner_calls"].tolist() == [(length(s) + 1) // 2 for s in SEEDS]
    assert (episodes["fallbacks"] == 0).all()
    assert list(dict.fromkeys(steps["seed"])) == SEEDS
    actions: dict[int, np.ndarray] = {}
    for env in envs:
        executed = iter([action for _, action in env.steps])
        actions |= {s: np.stack([*itertools.islice(executed, length(s))]) for s in env.seeds}  # type: ignore[misc, arg-type]
    for seed, own in steps.groupby("seed"):
        assert own["t"].tolist() == list(range(length(seed)))
        assert own["kind"].tolist() == (["planned", "open_loop"] * 4)[: length(seed)], "a plan of its own"
        assert own["reward"].tolist() == actions[seed][:, 0].tolist()
        change = np.linalg.norm(np.diff(actions[seed], axis=0), axis=-1)
        assert own["action_change"].tolist() == pytest.approx([np.nan, *change], nan_ok=True)
    returns = episodes.set_index("seed")["return"].to_dict()
    assert returns == {s: pytest.approx(float(own[:, 0].sum())) for s, own in actions.items()}
    assert done[-1] == len(SEEDS) and done == sorted(done) and done[0] == 0


MODES = {
    "teacher": TEACHER,
    "naive": NAIVE,
    "fallback": SpeculationConfig(execution_horizon=4, threshold=(0.95,)),
    "history": SpeculationConfig(execution_horizon=4, corrector="temporal"),
}


@pytest.mark.parametrize("name", MODES)
def test_an_episode_is_the_same_whatever_ran_before_it_and_beside_it(model: WorldModel, name: str) -> None:
    """A batch of two rows that takes five seeds in turn, against every seed with an agent of its own."""
    together = rollout(agent_of(model, MODES[name], 2), Seeded, SEEDS)
    alone = [rollout(agent_of(model, MODES[name], 1), Seeded, [seed]) for seed in SEEDS]
    for part in Rollout._fields:
        table = getattr(together, part)
        for seed, run in zip(SEEDS, alone, strict=True):
            own = table[table["seed"] == seed].reset_index(drop=True)
            for column in own:
                if own[column].dtype.kind == "f":
                    close = np.allclose(own[column], getattr(run, part)[column], atol=1e-4, equal_nan=True)
                    assert close, f"{column} of the episode with seed {seed}"
                else:
                    assert own[column].tolist() == getattr(run, part)[column].tolist()
    if name == "fallback":
        assert 0 < together.episodes["fallbacks"].sum() < together.episodes["length"].sum() - len(SEEDS)


def test_the_first_episodes_are_labelled_in_runs_of_steps(
    model: WorldModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tdmpc2.evaluation.rollout.LABEL_EVERY", 4)
    monkeypatch.setattr("tdmpc2.evaluation.rollout.LABEL_RUN", 2)
    envs, seeds = Environments(), [3, 7, 11, 8]
    _, steps = rollout(agent_of(model, NAIVE, 2), envs, seeds, labeller=quiet_teacher(model, 2))
    labelled = steps[steps["teacher_distance"].notna()]
    # Runs begin at the batch's steps 0 and 4, the second one without a warm start. The episode with seed 11
    # begins at step 5, when the one with seed 3 is still running.
    assert [env.seeds for env in envs] == [[3, 8], [7, 11]]
    assert labelled[["seed", "t"]].values.tolist() == [[3, 0], [3, 1], [3, 5], [7, 0], [7, 1]]
    teacher, expected = quiet_teacher(model, 1), []
    for t in (0, 1, 4, 5):
        if t == 4:
            teacher.reset()
        obs, action = envs[0].steps[t]
        expected.append(float(np.linalg.norm(action - teacher.plan(teacher.encode(obs)).mean[0, 0].numpy())))
    del expected[2]
    assert labelled["teacher_distance"][:3].tolist() == pytest.approx(expected, abs=1e-5)
    assert expected[1] > 1e-3, "executed as planned a step before"


def test_fewer_seeds_than_environments_are_refused(model: WorldModel) -> None:
    with pytest.raises(ValueError, match="3 environments for 2 seeds"):
        rollout(agent_of(model, NAIVE, 3), Seeded, [1, 2])


def test_random_episodes_are_functions_of_their_seeds() -> None:
    """A teacher that does no better than these fails, so they are the same each time."""
    envs = Environments()
    returns = random_returns(envs, [7, 3])
    assert [env.seeds for env in envs] == [[7, 3]] and envs[0].closed
    actions = np.stack([action for _, action in envs[0].steps])
    assert len(actions) == length(7) + length(3) and np.abs(actions).max() <= 1
    assert returns.tolist() == pytest.approx([actions[: length(7), 0].sum(), actions[length(7) :, 0].sum()])
    assert random_returns(Seeded, [3, 7]).tolist() == returns[::-1].tolist()


def test_latency_is_of_single_steps_from_the_first_one_on(
    model: WorldModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three steps are for warming up; of eight more, five are the whole episode and three of the next one."""
    clock = itertools.count(step=0.002)  # seconds; read before and after each call
    monkeypatch.setattr("tdmpc2.evaluation.rollout.time", SimpleNamespace(perf_counter=lambda: next(clock)))
    agents, envs = {"b": agent_of(model, NAIVE, 1), "a": agent_of(model, TEACHER, 1)}, Environments()
    latency = measure_latency(agents, envs, seed=7, steps=8, warm_up=3)
    assert [env.seeds for env in envs] == [[7, 7, None]] * 2 and all(env.closed for env in envs)
    assert latency["mode"].tolist() == ["b", "a"] * 8, "the modes take turns"
    assert latency["t"].tolist() == [t for t in range(8) for _ in agents]
    kinds = {mode: own["kind"].tolist() for mode, own in latency.groupby("mode")}
    assert kinds["b"] == [*["planned", "open_loop"] * 2, "planned", "planned", "open_loop", "planned"]
    assert kinds["a"] == ["planned"] * 8
    assert latency["act_ms"].tolist() == pytest.approx([2.0] * 16)
