"""Episodes of an agent on the real simulator, recorded step by step."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from typing import NamedTuple

import gymnasium as gym
import numpy as np
import pandas as pd
import torch

from ..agent import TDMPC2, Kind, SpeculativeAgent

# A label costs a plan: of so many steps, the first so many are labelled.
LABEL_EVERY, LABEL_RUN = 50, 12
STEP_COLUMNS = [
    *("seed", "t", "kind", "k", "mismatch", "delta_a"),
    "action_change",  # norm of the action minus that of the step before, NaN in an episode's first
    *("reward", "teacher_distance"),
]


class Rollout(NamedTuple):
    """Raw results of one mode; the columns are those of `episodes.csv` and `steps.csv`."""

    episodes: pd.DataFrame  # seed, return, length, terminated, planner_calls, fallbacks
    steps: pd.DataFrame  # STEP_COLUMNS


def rollout(
    agent: SpeculativeAgent,
    env_of: Callable[[], gym.Env],
    seeds: Sequence[int],
    *,
    labeller: TDMPC2 | None = None,
    on_step: Callable[[int], None] = lambda episodes_done: None,
) -> Rollout:
    """Run one episode for every seed, `agent.num_envs` at a time.

    Args:
        agent: its rows take the seeds in turn; a row that ends its episode begins the next one.
        env_of: makes one environment.
        seeds: of the episodes' initial states.
        labeller: a teacher that plans in the first `labeller.num_envs` episodes as well, in runs of steps, to
            measure how far the executed action is from its own (the mean of its plan's distribution); that
            column is NaN elsewhere.
        on_step: called after every step of the batch with the number of episodes that have ended.

    Returns:
        One row an episode and one row a step, in the order of the seeds.
    """
    n = min(agent.num_envs, len(seeds))
    if agent.num_envs > len(seeds):
        raise ValueError(f"{agent.num_envs} environments for {len(seeds)} seeds")
    with _opened(env_of, n) as envs:
        return _rollout(agent, envs, seeds, labeller, on_step)


@contextmanager
def _opened(env_of: Callable[[], gym.Env], n: int) -> Iterator[list[gym.Env]]:
    """`n` environments, closed whatever happens."""
    with ExitStack() as stack:
        yield [stack.enter_context(closing(env_of())) for _ in range(n)]


def _rollout(
    agent: SpeculativeAgent,
    envs: list[gym.Env],
    seeds: Sequence[int],
    labeller: TDMPC2 | None,
    on_step: Callable[[int], None],
) -> Rollout:
    n, waiting = len(envs), list(seeds)[::-1]
    row_seed = [waiting.pop() for _ in range(n)]
    obs = np.stack([env.reset(seed=s)[0] for env, s in zip(envs, row_seed, strict=True)])
    agent.reset()
    labelled = 0 if labeller is None else labeller.num_envs
    if labeller is not None:
        labeller.reset()
    running, t, clock = np.ones(n, dtype=bool), np.zeros(n, dtype=int), 0
    in_first = np.ones(n, dtype=bool)  # the row is in its first episode
    before = np.full((n, *envs[0].action_space.shape), np.nan)  # type: ignore[misc]  # actions of the last step
    steps: list[tuple] = []
    terminated_seeds: set[int] = set()
    calls = dict.fromkeys(seeds, 0)  # of the planner
    while running.any():
        action = agent.act(obs)
        info = agent.info
        assert info is not None
        distance = np.full(n, np.nan)
        phase = clock % LABEL_EVERY
        if labeller is not None and phase < LABEL_RUN:
            if phase == 0:
                labeller.reset()
            label = labeller.plan(labeller.encode(obs[:labelled])).mean[:, 0].cpu().numpy()
            if phase or not clock:  # without a warm start it is the teacher's only where an episode begins
                distance[:labelled] = np.linalg.norm(action[:labelled] - label, axis=-1)
        clock += 1
        change = np.linalg.norm(action - before, axis=-1)
        before[:] = action
        kind, k, mismatch, delta = (x.tolist() for x in info[:4])
        asked = info.asked.tolist()
        ended = np.zeros(n, dtype=bool)
        for i in np.flatnonzero(running):
            obs[i], reward, terminated, truncated, _ = envs[i].step(action[i])
            name = Kind(kind[i]).name.lower()
            if not in_first[i]:
                distance[i] = np.nan
            happened = (name, k[i], mismatch[i], delta[i], change[i], float(reward), distance[i])
            steps.append((row_seed[i], t[i], *happened))
            t[i] += 1
            calls[row_seed[i]] += asked[i]
            if terminated:
                terminated_seeds.add(row_seed[i])
            if terminated or truncated:
                ended[i] = True
                in_first[i] = False
                before[i] = np.nan
                if waiting:
                    row_seed[i], t[i] = waiting.pop(), 0
                    obs[i], _ = envs[i].reset(seed=row_seed[i])
                else:
                    running[i] = False
        if ended.any():
            agent.reset(torch.from_numpy(ended))
            if not in_first[:labelled].any():
                labeller = None
        on_step(len(seeds) - len(waiting) - int(running.sum()))
    table = pd.DataFrame(steps, columns=STEP_COLUMNS)
    order = {seed: i for i, seed in enumerate(seeds)}
    table = table.sort_values(by=["seed", "t"], key=lambda c: c.map(order) if c.name == "seed" else c)
    table = table.reset_index(drop=True)
    return Rollout(_episodes(table, terminated_seeds, calls), table)


def _episodes(steps: pd.DataFrame, terminated: set[int], calls: dict[int, int]) -> pd.DataFrame:
    kind, by_seed = steps["kind"], steps.groupby("seed")
    table = pd.DataFrame(
        {
            "return": by_seed["reward"].sum(),
            "length": by_seed.size(),
            "terminated": by_seed.size().index.isin(terminated),
            "planner_calls": pd.Series(calls),
            "fallbacks": (kind == "fallback").groupby(steps["seed"]).sum(),
        }
    )
    return table.loc[list(calls)].rename_axis("seed").reset_index()


def random_returns(env_of: Callable[[], gym.Env], seeds: Sequence[int]) -> np.ndarray:
    """Returns `[n]` of uniformly random actions, one episode for each seed."""
    returns = []
    with closing(env_of()) as env:
        for seed in seeds:
            env.reset(seed=seed)
            rng, total, done = np.random.default_rng(seed), 0.0, False
            while not done:
                action = rng.uniform(-1, 1, env.action_space.shape).astype(np.float32)
                _, reward, terminated, truncated, _ = env.step(action)
                total, done = total + float(reward), terminated or truncated
            returns.append(total)
    return np.array(returns)


def measure_latency(
    agents: dict[str, SpeculativeAgent],
    env_of: Callable[[], gym.Env],
    seed: int,
    steps: int,
    warm_up: int = 20,
) -> pd.DataFrame:
    """Time of single `act` calls at batch 1, the modes taking turns, so that noise hits all alike.

    Timed from an episode's first step on: replans are where they are, not where a later window shows them.

    Args:
        agents: of one row each.
        env_of: makes one environment; every mode has its own.
        seed: of the initial state.
        steps: measured steps a mode.
        warm_up: steps of another episode, before the first measured one.

    Returns:
        Columns `mode, t, kind, act_ms`, in the order of `agents` within each step.
    """
    rows = []
    with _opened(env_of, len(agents)) as opened:
        envs = dict(zip(agents, opened, strict=True))
        obs = {mode: env.reset(seed=seed)[0] for mode, env in envs.items()}
        for agent in agents.values():
            agent.reset()
        for t in range(-warm_up, steps):
            for mode, agent in agents.items():
                if t == 0:
                    obs[mode], _ = envs[mode].reset(seed=seed)
                    agent.reset()
                start = time.perf_counter()
                action = agent.act(obs[mode])
                seconds = time.perf_counter() - start
                assert agent.info is not None
                if t >= 0:
                    kind = Kind(int(agent.info.kind[0])).name.lower()
                    rows.append((mode, t, kind, 1e3 * seconds))
                obs[mode], _, terminated, truncated, _ = envs[mode].step(action)
                if terminated or truncated:
                    obs[mode], _ = envs[mode].reset()
                    agent.reset()
    return pd.DataFrame(rows, columns=["mode", "t", "kind", "act_ms"])
