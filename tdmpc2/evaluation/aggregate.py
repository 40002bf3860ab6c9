"""Results over tasks: a table of every task and setting, and of all tasks pooled."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

from ..errors import DataError
from .metrics import RESAMPLES, act_columns, act_times, percentile_level

ALL = "all"  # the table's name for all tasks pooled
CHOSEN = "chosen"  # the setting in which each task has its chosen mode
COLUMNS = [
    *("task", "setting", "chosen", "episodes", "return_mean", "return_ratio", "return_ratio_low"),
    *("return_ratio_high", "planner_calls", "fallbacks", "act_ms_median", "act_ms_p99"),
]


class TaskResults(NamedTuple):
    """The results of one task's evaluation."""

    summary: pd.DataFrame  # one row per mode, the baseline first
    episodes: pd.DataFrame  # columns `mode, seed, return, length, planner_calls, fallbacks`
    latency: pd.DataFrame  # columns `mode, kind, act_ms`
    chosen: str  # a mode


def speculation_table(tasks: Mapping[str, TaskResults]) -> pd.DataFrame:
    """A row per task and mode; then, for task `all`, a row per mode that all tasks have, and `chosen`."""
    rows = [
        {**row, "task": task, "setting": row["mode"], "chosen": row["mode"] == results.chosen}
        for task, results in tasks.items()
        for row in results.summary.to_dict("records")
    ]
    first = next(iter(tasks.values())).summary["mode"]
    shared = [mode for mode in first if all(mode in set(r.summary["mode"]) for r in tasks.values())]
    for setting in [*shared, CHOSEN]:
        modes = modes_of(tasks, setting)
        rows.append({"task": ALL, "setting": setting, "chosen": setting == CHOSEN, **pooled(tasks, modes)})
    return pd.DataFrame(rows)[COLUMNS]


def modes_of(tasks: Mapping[str, TaskResults], setting: str) -> dict[str, str]:
    """Each task's mode in a setting."""
    return {task: r.chosen if setting == CHOSEN else setting for task, r in tasks.items()}


def pooled(tasks: Mapping[str, TaskResults], modes: Mapping[str, str]) -> dict[str, float]:
    """Statistics of one mode per task, all tasks pooled.

    Returns are normalised by their task's mean baseline return. The return ratio is the interquartile mean
    over the episodes of all tasks, divided by the baseline's (which is not 1 if returns are skewed). Its
    interval resamples seeds within each task, each with its baseline episode (Agarwal et al. 2021, "Deep RL
    at the edge of the statistical precipice", paired). Planner calls and fallbacks are means over tasks.
    Latencies are quantiles of all timed steps, with equal weight per task.

    Raises:
        DataError: a baseline's mean return is not positive.
    """
    returns, counts, times = paired_returns(tasks, modes), [], []
    for task, mode in modes.items():
        r = tasks[task]
        own = r.episodes[r.episodes["mode"] == mode]
        counts.append([own[name].sum() / own["length"].sum() for name in ("planner_calls", "fallbacks")])
        times.append(act_times(r.latency, mode, counts[-1][0]))
    planner_calls, fallbacks = np.mean(counts, 0)
    low, high = stratified_interval(returns, interquartile_mean_ratio)
    latency = act_columns(np.concatenate([t for t, _ in times]), np.concatenate([w for _, w in times]))
    return {
        "episodes": sum(pair.shape[1] for pair in returns),
        "return_mean": np.nan,  # means of different tasks cannot be averaged
        "return_ratio": float(interquartile_mean_ratio([pair[:, None] for pair in returns])[0]),
        "return_ratio_low": low,
        "return_ratio_high": high,
        "planner_calls": planner_calls,
        "fallbacks": fallbacks,
        "act_ms_median": latency["act_ms_median"],
        "act_ms_p99": latency["act_ms_p99"],
    }


def paired_returns(tasks: Mapping[str, TaskResults], modes: Mapping[str, str]) -> list[np.ndarray]:
    """For each task `[2, n]`: returns of its mode and its baseline on the same seeds.

    Raises:
        DataError: a baseline's mean return is not positive.
    """
    pairs = []
    for task, mode in modes.items():
        by_mode = tasks[task].episodes.pivot(index="seed", columns="mode", values="return")
        pair = by_mode[[mode, tasks[task].summary["mode"].iloc[0]]].to_numpy().T
        if pair[1].mean() <= 0:
            raise DataError(f"{task}: its baseline's mean is not positive, so no return ratio exists")
        pairs.append(pair)
    return pairs


def mean_ratio(returns: list[np.ndarray]) -> np.ndarray:
    """The mean `[R]` over tasks of the ratio of mean returns to the baseline's.

    Args:
        returns: per task `[2, R, n]`, a mode's and the baseline's.
    """
    means = [pair.mean(-1) for pair in returns]
    return np.mean([own / baseline for own, baseline in means], axis=0)


def interquartile_mean_ratio(returns: list[np.ndarray]) -> np.ndarray:
    """The interquartile mean `[R]` of normalised returns, divided by the baseline's.

    Args:
        returns: per task `[2, R, n]`, a mode's and the baseline's.
    """
    normalised = [pair / pair[1].mean(-1, keepdims=True) for pair in returns]
    own, baseline = stats.trim_mean(np.concatenate(normalised, -1), 0.25, axis=-1)
    return own / baseline


def stratified_interval(
    returns: list[np.ndarray], statistic: Callable[[list[np.ndarray]], np.ndarray], rng_seed: int = 0
) -> tuple[float, float]:
    """The 95 % bootstrap interval of one of the two ratios above; NaN if a task has one episode.

    Each task's `[2, n]` is resampled separately.
    """
    fewest = min(pair.shape[1] for pair in returns)
    if fewest < 2:
        return np.nan, np.nan
    rng = np.random.default_rng(rng_seed)
    resampled = []
    for pair in returns:
        n = pair.shape[1]
        resampled.append(pair[:, rng.integers(n, size=(RESAMPLES, n))])  # [2, RESAMPLES, n]
    tail = (1 - percentile_level(fewest, sum(pair.shape[1] - 1 for pair in returns))) / 2
    low, high = np.quantile(statistic(resampled), [tail, 1 - tail])
    return float(low), float(high)
