"""Return against control frequency, where the world does not wait for the agent.

At every tick of its clock the world executes one agent step with the newest action. An action is in time if
it is ready before the next tick. Otherwise the world goes on with the action before it, for as many ticks as
the new one takes; the observations of these ticks are never seen. Only an episode's first action may take its
time. The time that the simulator itself takes does not count: plans in the background get less by it.
"""

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing

import gymnasium as gym
import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from ..agent import SpeculativeAgent
from ..background import BackgroundAgent

FREQUENCIES = (5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0)  # Hz
LOOK = 5e-4  # seconds between two looks at a plan under way


def realtime(
    agents: Mapping[str, Callable[[], SpeculativeAgent]],
    env_of: Callable[[], gym.Env],
    seeds: Sequence[int],
    frequencies: Sequence[float],
    on_episode: Callable[[], None] = lambda: None,
) -> pd.DataFrame:
    """Episodes of each agent at each control frequency.

    Args:
        agents: what makes each, with one row.
        env_of: makes an environment.
        seeds: of the episodes; the same for all.
        frequencies: agent steps per second, in Hz.
        on_episode: called after each episode.

    Returns:
        One row an episode: `agent, hz, seed, return, length, late, plans, act_ms_median, act_ms_max`. `late`
        is the share of the steps in which the world had no new action, `plans` the number of plans taken.
    """
    rows = []
    for name in reversed(list(agents)):  # the last is the one that may not start: it says so at once
        agent = agents[name]()
        gc.collect()
        gc.freeze()  # garbage collection need not look again at what has been loaded
        with closing(env_of()) as env:
            for hz in frequencies:
                for seed in seeds:
                    rows.append({"agent": name, "hz": hz, "seed": seed, **episode(agent, env, seed, 1 / hz)})
                    on_episode()
        if isinstance(agent, BackgroundAgent):
            agent.close()
    gc.unfreeze()
    order = list(agents)
    return pd.DataFrame(sorted(rows, key=lambda row: order.index(str(row["agent"]))))


def episode(agent: SpeculativeAgent, env: gym.Env, seed: int, period: float) -> dict[str, float]:
    """One episode; `period` is the time between two ticks, in seconds."""
    obs, _ = env.reset(seed=seed)
    agent.reset()
    action = agent.act(obs)  # the world begins when it is ready
    total, length, late, plans, times, over = 0.0, 0, 0, 0, [], False
    while True:
        before = time.perf_counter()
        plans += agent.info is not None and int(agent.info.taken)
        obs, reward, terminated, truncated, _ = env.step(action)
        simulating = time.perf_counter() - before
        total, length, over = total + float(reward), length + 1, terminated or truncated
        if over:
            break
        start = time.perf_counter()
        new = agent.act(obs)
        times.append(time.perf_counter() - start)
        for _ in range(int(times[-1] / period)):  # ticks that were missed
            if not over:
                _, reward, terminated, truncated, _ = env.step(action)
                total, length, over = total + float(reward), length + 1, terminated or truncated
                late += 1
        if over:
            break
        action = new
        if isinstance(agent, BackgroundAgent):  # nothing else goes on until the next tick
            # The planner also computed while the world was simulated.
            tick = start + period * np.ceil(times[-1] / period) - simulating
            while agent.source.is_planning() and time.perf_counter() < tick:
                time.sleep(min(LOOK, max(tick - time.perf_counter(), 0)))
    ms = 1e3 * np.array(times or [np.nan])
    return {
        "return": total,
        "length": length,
        "late": late / length,
        "plans": plans,
        "act_ms_median": float(np.median(ms)),
        "act_ms_max": float(ms.max()),
    }


def draw(axes: Axes, episodes: pd.DataFrame, title: str, own_hz: float | None) -> None:
    """Mean return against control frequency, a line an agent; the last agent's is thick.

    Args:
        axes: to draw on.
        episodes: from `realtime`.
        title: of the axes.
        own_hz: the task's own frequency; None: not known.
    """
    agents = list(dict.fromkeys(episodes["agent"]))
    for name in agents:
        by_hz = episodes[episodes["agent"] == name].groupby("hz")["return"]
        mean, width = by_hz.mean(), 3 if name == agents[-1] else 1.5
        axes.plot(mean.index, mean, marker="o", linewidth=width, label=name)
        axes.fill_between(mean.index, by_hz.min(), by_hz.max(), alpha=0.15)
    if own_hz:
        axes.axvline(own_hz, color="0.5", linestyle=":", linewidth=1)
        axes.annotate("the task's own", (own_hz, 0.02), xycoords=("data", "axes fraction"), color="0.4")
    ticks = sorted(episodes["hz"].unique())
    axes.set_xscale("log")
    axes.set_xticks(ticks, [f"{hz:g}" for hz in ticks])
    axes.minorticks_off()
    axes.set(xlabel="control frequency, Hz", ylabel="return", title=title, ylim=(0, None))
    axes.spines[["top", "right"]].set_visible(False)
