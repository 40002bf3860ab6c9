"""From raw episodes and steps to the numbers of a report; all functions are pure.

Every mode faced the same initial states, so ratios to the baseline, the first mode, are paired: the
bootstrap resamples seeds, and a seed brings its episode of both modes along.
"""

import numpy as np
import pandas as pd
from scipy import stats

from ..errors import DataError

RESAMPLES = 10_000


def summarise(
    episodes: pd.DataFrame, steps: pd.DataFrame, latency: pd.DataFrame | None, *, rng_seed: int = 0
) -> pd.DataFrame:
    """One row a mode, in the order of `episodes`; the first is the baseline.

    Args:
        episodes: columns `mode, seed, return, length, terminated, planner_calls, fallbacks`.
        steps: columns `mode, kind, k, delta_a, ...`.
        latency: columns `mode, act_ms`; None leaves the columns of latency out.
        rng_seed: of the bootstrap.

    Returns:
        `planner_calls` and `fallbacks` are fractions of the steps; `return_worst5` is the mean of the
        worst 5 % of the episodes, at least one; `failure_rate` the share of episodes with less than
        half of the baseline's return on the same seed; `delta_a` the mean size of the correction over
        the steps after a plan's first. `return_ratio` and its 95 % interval are NaN where the
        baseline's mean return is not positive, for there a ratio says nothing.

    Raises:
        DataError: the modes did not face the same seeds, or a return is not a number.
    """
    if not np.isfinite(episodes["return"]).all():
        raise DataError("an episode's return is not a number: the results are damaged, run it again")
    modes = list(dict.fromkeys(episodes["mode"]))
    by_mode = {mode: episodes[episodes["mode"] == mode].set_index("seed") for mode in modes}
    baseline = by_mode[modes[0]]
    rows = []
    for mode, own in by_mode.items():
        if not own.index.is_unique or set(own.index) != set(baseline.index):
            raise DataError(f"{mode} and {modes[0]} did not face the same seeds: run both again")
        own = own.loc[baseline.index]
        returns = own["return"].to_numpy()
        ratio, low, high = paired_ratio(returns, baseline["return"].to_numpy(), rng_seed)
        mine = steps[steps["mode"] == mode]
        worst = np.sort(returns)[: max(1, int(0.05 * len(returns)))]
        row = {
            "mode": mode,
            "episodes": len(returns),
            "return_mean": returns.mean(),
            "return_median": np.median(returns),
            "return_iqm": stats.trim_mean(returns, 0.25),
            "return_worst5": worst.mean(),
            "failure_rate": (returns < 0.5 * baseline["return"].to_numpy()).mean(),
            "termination_rate": own["terminated"].mean(),
            "planner_calls": own["planner_calls"].sum() / own["length"].sum(),
            "fallbacks": own["fallbacks"].sum() / own["length"].sum(),
            "delta_a": mine.loc[mine["kind"].isin(["corrected", "open_loop"]), "delta_a"].mean(),
            "return_ratio": ratio,
            "return_ratio_low": low,
            "return_ratio_high": high,
        }
        if latency is not None:
            times = latency.loc[latency["mode"] == mode, "act_ms"].to_numpy()
            first = latency.loc[latency["mode"] == modes[0], "act_ms"].to_numpy()
            row |= {
                "act_ms_median": np.median(times),
                "act_ms_p95": np.quantile(times, 0.95),
                "act_ms_p99": np.quantile(times, 0.99),
                "act_ms_mean": times.mean(),
                "latency_ratio": np.median(times) / np.median(first),
                "mean_latency_ratio": times.mean() / first.mean(),
            }
        rows.append(row)
    return pd.DataFrame(rows)


def paired_ratio(
    returns: np.ndarray, baseline: np.ndarray, rng_seed: int = 0
) -> tuple[float, float, float]:
    """Ratio of mean returns to the baseline's with its 95 % paired bootstrap interval.

    Args:
        returns: `[n]`, one episode a seed.
        baseline: `[n]`, the baseline's on the same seeds.
        rng_seed: of the resampling.

    Returns:
        Ratio, lower and upper end (percentile method); NaN where the baseline's mean, or a resampled
        one, is not positive, and for the ends where there is one episode only.
    """
    if baseline.mean() <= 0:
        return np.nan, np.nan, np.nan
    ratio = returns.mean() / baseline.mean()
    if len(returns) < 2:
        return ratio, np.nan, np.nan
    index = np.random.default_rng(rng_seed).integers(len(returns), size=(RESAMPLES, len(returns)))
    below = baseline[index].sum(1)
    if (below <= 0).any():
        return ratio, np.nan, np.nan
    low, high = np.quantile(returns[index].sum(1) / below, [0.025, 0.975])
    return ratio, low, high


def by_step_in_plan(steps: pd.DataFrame) -> pd.DataFrame:
    """Means by mode and step in plan of what is defined there; NaN steps are left out and counted.

    Fallbacks stand at the step where the mismatch was seen.

    Returns:
        Columns `mode, k, steps` and for `mismatch`, `delta_a`, `reward`, `teacher_distance` the mean,
        the quartiles (`_q25`, `_q75`) and the number of values (`_n`).
    """
    names = ["mismatch", "delta_a", "reward", "teacher_distance"]
    grouped = steps.groupby(["mode", "k"], sort=False)
    table = grouped.size().rename("steps").to_frame()
    for name in names:
        table[name] = grouped[name].mean()
        table[f"{name}_q25"] = grouped[name].quantile(0.25)
        table[f"{name}_q75"] = grouped[name].quantile(0.75)
        table[f"{name}_n"] = grouped[name].count()
    order = {mode: i for i, mode in enumerate(dict.fromkeys(steps["mode"]))}
    table = table.reset_index()
    return table.sort_values(["mode", "k"], key=lambda c: c.map(order) if c.name == "mode" else c)
