"""Over tasks: the pooled row is what its parts say, and its interval covers what it should."""

from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from tdmpc2.errors import DataError
from tdmpc2.evaluation.aggregate import (
    ALL,
    CHOSEN,
    COLUMNS,
    TaskResults,
    interquartile_mean_ratio,
    mean_ratio,
    speculation_table,
    stratified_interval,
)
from tdmpc2.evaluation.metrics import summarise


def task_results(scale: float, ratio: float, chosen: str, extra: str = "") -> TaskResults:
    """Twelve episodes a mode; the mode `fast` has `ratio` of the baseline's return and calls 10 %."""
    seeds = np.arange(12)
    base = scale * (100 + seeds)
    modes = {"baseline": (base, 500), "fast": (ratio * base, 50)}
    if extra:
        modes[extra] = (base, 250)
    episodes = pd.concat(
        pd.DataFrame(
            {
                "mode": mode,
                "seed": seeds,
                "return": returns,
                "length": 500,
                "terminated": False,
                "planner_calls": calls,
                "fallbacks": calls // 50,
            }
        )
        for mode, (returns, calls) in modes.items()
    )
    steps = pd.DataFrame({"mode": list(modes), "kind": "planned", "delta_a": 0.0, "action_change": 0.0})
    latency = pd.DataFrame(
        {"mode": ["baseline", *modes], "kind": "planned", "act_ms": [20.0, 20.0, 2.0, 5.0][: len(modes) + 1]}
    )
    latency.loc[2:, "kind"] = "corrected"
    return TaskResults(summarise(episodes, steps, latency), episodes, latency, chosen)


def test_table() -> None:
    table = speculation_table(
        {"a": task_results(1.0, 0.9, "fast"), "b": task_results(7.0, 1.0, "baseline", extra="only_b")}
    )
    assert list(table.columns) == COLUMNS
    assert len(table) == 2 + 3 + 3  # only_b is not a mode of all tasks
    all_tasks = table[table["task"] == ALL].set_index("setting")
    assert list(all_tasks.index) == ["baseline", "fast", CHOSEN]
    assert all_tasks.loc["baseline", "return_ratio"] == 1.0
    fast = all_tasks.loc["fast"]
    assert fast["planner_calls"] == pytest.approx(0.1) and fast["fallbacks"] == pytest.approx(0.002)
    assert 0.9 < fast["return_ratio"] < 1.0 and fast["episodes"] == 24
    # The chosen setting takes `fast` on a alone, where it loses a tenth.
    assert all_tasks.loc[CHOSEN, "planner_calls"] == pytest.approx(0.55)
    # On a, nine of ten steps take 2 ms; on b all take 20 ms.
    assert (all_tasks.loc[CHOSEN, "act_ms_median"], fast["act_ms_median"]) == (20.0, 2.0)
    assert table.set_index(["task", "setting"]).loc[("a", "fast"), "chosen"]


def test_pairs_stay_together() -> None:
    """Seeds that are hard for both modes do not widen the interval."""
    rng = np.random.default_rng(0)
    base = rng.uniform(200, 1000, 40)
    low, high = stratified_interval([np.stack([base, base])], mean_ratio)
    apart_low, apart_high = stratified_interval([np.stack([rng.permutation(base), base])], mean_ratio)
    assert high - low < 0.5 * (apart_high - apart_low)


@pytest.mark.parametrize("statistic", [interquartile_mean_ratio, mean_ratio])
def test_interval_covers(statistic: Callable[[list[np.ndarray]], np.ndarray]) -> None:
    """Of 95 % intervals, about that share holds the true ratio, here of symmetric noise around 0.95."""
    rng, inside = np.random.default_rng(1), 0
    for i in range(60):
        tasks = []
        for scale in (1.0, 50.0):
            base = scale * rng.normal(100, 2, 20)
            tasks.append(np.stack([0.95 * scale * rng.normal(100, 2, 20), base]))
        low, high = stratified_interval(tasks, statistic, rng_seed=i)
        inside += low <= 0.95 <= high
    assert 48 <= inside <= 60


@pytest.mark.parametrize("tasks", [1, 2])
def test_interval_of_few_episodes_is_as_wide_as_that_of_student(tasks: int) -> None:
    """Plain percentiles of ten episodes are narrower by 18 %, of two tasks with ten each by 11 %."""
    own = np.random.default_rng(4).normal(100, 5, (tasks, 10))
    low, high = stratified_interval([np.stack([x, np.full(10, 100.0)]) for x in own], mean_ratio)
    error = np.sqrt((stats.sem(own, axis=1) ** 2).sum()) / tasks
    width = 2 * stats.t.ppf(0.975, 9 * tasks) * error
    assert 100 * (high - low) == pytest.approx(width, rel=0.05)


def test_a_single_episode_has_no_interval_and_no_return_no_ratio() -> None:
    many, one = np.full((2, 5), 3.0), np.full((2, 1), 3.0)
    assert np.isnan(stratified_interval([many, one], mean_ratio)).all()
    nothing = task_results(1.0, 1.0, "fast")
    nothing.episodes["return"] = 0.0
    with pytest.raises(DataError, match="nothing: its baseline's mean is not positive"):
        speculation_table({"nothing": nothing})


def test_tasks_count_alike_whatever_their_returns() -> None:
    """Every return is a task's own share of its baseline's: half of 10 weighs as much as half of 1000."""
    rng = np.random.default_rng(0)
    small, large = (scale * rng.uniform(0.8, 1.2, 20) for scale in (10.0, 1000.0))
    half_of_small = [np.stack([0.5 * small, small])[:, None], np.stack([large, large])[:, None]]
    half_of_large = [np.stack([small, small])[:, None], np.stack([0.5 * large, large])[:, None]]
    ratios = [interquartile_mean_ratio(returns)[0] for returns in (half_of_small, half_of_large)]
    assert ratios == pytest.approx([0.75, 0.75], abs=0.05)


def test_skewed_baseline_is_its_own_measure() -> None:
    """A baseline that fails now and then has most episodes above its mean: the mode may not gain by that."""
    base = np.full(20, 100.0)
    base[:4] = 0.0
    assert interquartile_mean_ratio([np.stack([0.9 * base, base])[:, None]])[0] == pytest.approx(0.9)


def test_outliers_count_less_than_in_a_mean() -> None:
    base = np.full(20, 100.0)
    own = base.copy()
    own[:4] = 0.0  # a fifth of the episodes fail
    assert interquartile_mean_ratio([np.stack([own, base])[:, None]])[0] == 1.0
    assert mean_ratio([np.stack([own, base])[:, None]])[0] == pytest.approx(0.8)
