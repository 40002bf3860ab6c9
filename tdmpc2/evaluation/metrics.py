"""Metrics of a report, from raw episodes and steps; all functions are pure.

The baseline is the first mode. All modes ran from the same initial states, so ratios to the baseline are
paired: the bootstrap resamples seeds, each with its episodes of both modes. Intervals cover the variation
between episodes. They do not cover the variation between trainings, nor rare failures that no seed showed.
"""

import warnings
from collections.abc import Callable

import numpy as np
import pandas as pd
from scipy import stats

from ..agent import Kind
from ..errors import DataError

RESAMPLES = 9_999  # of a bootstrap
CONFIDENCE = 0.95  # of every interval
FAILED = 0.5  # fraction of the baseline's return on the same seed; an episode that loses more has failed
PLANS = tuple(kind.name.lower() for kind in (Kind.PLANNED, Kind.FALLBACK))  # kinds of steps that plan


def summarise(
    episodes: pd.DataFrame, steps: pd.DataFrame, latency: pd.DataFrame | None, *, rng_seed: int = 0
) -> pd.DataFrame:
    """One row per mode, in the order of `episodes`; the first is the baseline.

    Args:
        episodes: columns `mode, seed, return, length, terminated, planner_calls, fallbacks`.
        steps: columns `mode, kind, k, delta_a, ...`.
        latency: columns `mode, kind, act_ms`; None: no latency columns.
        rng_seed: of the bootstrap.

    Returns:
        `return_low` and `return_high` are the 95 % interval of `return_mean`. `return_worst5` is the mean of
        the worst 5 % of the episodes, at least one. `failure_rate` is the share of episodes that lose more
        than half of the baseline's absolute return on the same seed. `planner_calls` and `fallbacks` are
        fractions of the steps. `delta_a` is the mean norm of the correction over the steps after a plan's
        first (NaN: no such step). `return_ratio` and its 95 % interval come from `paired_ratio`; they are NaN
        if the baseline's mean return is not positive. `return_difference_low` is the lower end of the 95 %
        interval of the mean difference to the baseline. Latencies are in ms, weighted as in `act_times`.

    Raises:
        DataError: the modes have different seeds, or a required number is missing.
    """
    modes = list(dict.fromkeys(episodes["mode"]))
    _check("episodes", episodes, modes, ["return", "length", "planner_calls", "fallbacks"])
    _check("steps", steps, modes, ["delta_a"])
    if latency is not None:
        _check("latency", latency, modes, ["act_ms"])
    baseline = episodes[episodes["mode"] == modes[0]].set_index("seed")
    reference = baseline["return"].to_numpy(float)
    rows = []
    for mode in modes:
        own = episodes[episodes["mode"] == mode].set_index("seed")
        if not own.index.is_unique or set(own.index) != set(baseline.index):
            raise DataError(f"{mode} and {modes[0]} did not run on the same seeds: run both again")
        own = own.loc[baseline.index]
        returns = own["return"].to_numpy(float)
        low, high = mean_interval(returns, rng_seed)
        ratio, ratio_low, ratio_high = paired_ratio(returns, reference, rng_seed)
        difference_low, _ = mean_interval(returns - reference, rng_seed)
        later = (steps["mode"] == mode) & steps["kind"].isin(["corrected", "open_loop"])
        row = {
            "mode": mode,
            "episodes": len(returns),
            "return_mean": returns.mean(),
            "return_low": low,
            "return_high": high,
            "return_median": np.median(returns),
            "return_iqm": stats.trim_mean(returns, 0.25),
            "return_worst5": np.sort(returns)[: max(1, len(returns) // 20)].mean(),
            "failure_rate": (returns < reference - FAILED * np.abs(reference)).mean(),
            "termination_rate": own["terminated"].mean(),
            "planner_calls": own["planner_calls"].sum() / own["length"].sum(),
            "fallbacks": own["fallbacks"].sum() / own["length"].sum(),
            "delta_a": steps.loc[later, "delta_a"].mean(),
            "action_change": steps.loc[steps["mode"] == mode, "action_change"].mean(),
            "return_ratio": ratio,
            "return_ratio_low": ratio_low,
            "return_ratio_high": ratio_high,
            "return_difference_low": difference_low,
        }
        if latency is not None:
            row |= act_columns(*act_times(latency, mode, row["planner_calls"]))
        rows.append(row)
    return pd.DataFrame(rows)


def act_times(latency: pd.DataFrame, mode: str, planner_calls: float) -> tuple[np.ndarray, np.ndarray]:
    """Times of a mode's `act` calls `[n]`, in ms, and their weights `[n]`, which sum to one.

    In the few timed steps a mode may plan more often than in its episodes, or never. So the timed steps that
    planned share the weight `planner_calls`, the fraction of planner calls in all episodes. If no such step
    was timed, the planned steps of the first mode, the baseline, replace them.
    """
    own, plans = latency["mode"] == mode, latency["kind"].isin(PLANS)
    planned = own & plans
    if planner_calls and not planned.any():
        planned = (latency["mode"] == latency["mode"].iloc[0]) & plans
    times = [latency.loc[group, "act_ms"].to_numpy(float) for group in (planned, own & ~plans)]
    shares = [planner_calls, 1 - planner_calls]
    weights = [np.full(len(t), share / max(len(t), 1)) for t, share in zip(times, shares, strict=True)]
    weight = np.concatenate(weights)
    return np.concatenate(times), weight / weight.sum()


def act_columns(times: np.ndarray, weights: np.ndarray) -> dict[str, float]:
    """Median, high quantiles and mean of weighted times; both arguments are `[n]`."""

    def quantile(q: float) -> float:
        return float(np.quantile(times, q, weights=weights, method="inverted_cdf"))

    return {
        "act_ms_median": quantile(0.5),
        "act_ms_p95": quantile(0.95),
        "act_ms_p99": quantile(0.99),
        "act_ms_mean": float(np.average(times, weights=weights)),
    }


def paired_ratio(returns: np.ndarray, baseline: np.ndarray, rng_seed: int = 0) -> tuple[float, float, float]:
    """Ratio of mean returns to the baseline's, with its 95 % paired bootstrap interval.

    Args:
        returns: `[n]`, one episode per seed.
        baseline: `[n]`, the baseline's on the same seeds.
        rng_seed: of the resampling.

    Returns:
        Ratio, lower and upper end. All are NaN if the baseline's mean is not positive. The ends are NaN if a
        resampled baseline mean is not positive, or for a single episode.
    """
    if baseline.mean() <= 0:
        return np.nan, np.nan, np.nan
    ratio = float(returns.mean() / baseline.mean())

    def statistic(own: np.ndarray, base: np.ndarray, axis: int = -1) -> np.ndarray:
        below = base.sum(axis)
        # A NaN makes both ends NaN: no interval is better than one from the positive resamples only.
        return own.sum(axis) / np.where(below > 0, below, np.nan)

    return ratio, *_interval((returns, baseline), statistic, rng_seed)


def with_interval(ratio: float, low: float, high: float) -> str:
    """A ratio and, if it has one, its interval, as text."""
    return f"{ratio:.3f}" + ("" if np.isnan(low) else f" [{low:.3f}, {high:.3f}]")


def holds_up(summary: pd.DataFrame, min_return: float) -> pd.Series:
    """The modes that keep `min_return` of the baseline's return, by the lower end of the interval.

    If the baseline's mean return is not positive, the loss must be at most `1 - min_return` of its absolute
    value.
    """
    baseline = summary["return_mean"].iloc[0]
    if baseline > 0:
        good = summary["return_ratio_low"] >= min_return
    else:
        good = summary["return_difference_low"] >= -(1 - min_return) * abs(baseline)
    return good | (summary.index == summary.index[0])


def mean_interval(values: np.ndarray, rng_seed: int = 0) -> tuple[float, float]:
    """The 95 % bootstrap interval of the mean of `values` `[n]`; NaN if n is 1."""
    return _interval((values,), np.mean, rng_seed)


def _interval(
    samples: tuple[np.ndarray, ...], statistic: Callable[..., np.ndarray], rng_seed: int
) -> tuple[float, float]:
    """Bootstrap interval of `statistic(*samples)`; the samples `[n]` are resampled together."""
    n = len(samples[0])
    if n < 2:
        return np.nan, np.nan
    level = percentile_level(n, n - 1)
    with warnings.catch_warnings():
        # SciPy warns about NaN ends, which are intended here.
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)
        ends = stats.bootstrap(
            samples,
            statistic,
            paired=True,
            vectorized=True,
            n_resamples=RESAMPLES,
            confidence_level=level,
            method="percentile",
            rng=np.random.default_rng(rng_seed),
        ).confidence_interval
    return float(ends.low), float(ends.high)


def percentile_level(n: int, freedom: int) -> float:
    """The nominal level of a percentile bootstrap that gives a 95 % interval.

    It widens intervals for small n to match Student's t (Hesterberg 2015, "What teachers should know about
    the bootstrap", section 5.3). Plain percentiles and BCa cover the true value in about 90 % of the cases
    with 10 episodes and 93 % with 20; these intervals in about 94 % and 95 %.

    Args:
        n: size of a sample, at least 2.
        freedom: degrees of freedom, summed over samples that are resampled separately.
    """
    t = stats.t.ppf((1 + CONFIDENCE) / 2, freedom)
    return float(1 - 2 * stats.norm.sf(t * np.sqrt(n / (n - 1))))


def by_step_in_plan(steps: pd.DataFrame) -> pd.DataFrame:
    """Statistics by mode and step in plan k; NaN values are left out.

    A mismatch that led to a fallback counts at the k where it was seen; else the largest would be missing.
    The fallback's action is the first of a new plan: its reward, correction and distance to the teacher
    count at k = 0.

    Args:
        steps: columns `mode, kind, k, mismatch, delta_a, reward, teacher_distance`.

    Returns:
        Columns `mode, k, steps` (number executed at k) and, for `mismatch`, `delta_a`, `reward` and
        `teacher_distance`, the mean, the quartiles (`_q25`, `_q75`) and the number of values (`_n`).
        Modes are in the order of `steps`, k ascending.
    """
    executed = steps.assign(k=steps["k"].mask(steps["kind"].isin(["fallback", "prior"]), 0))
    table = steps.groupby(["mode", "k"], sort=False)[[]].first()
    table["steps"] = executed.groupby(["mode", "k"]).size()
    table["steps"] = table["steps"].fillna(0).astype(int)
    for name in ["mismatch", "delta_a", "reward", "teacher_distance"]:
        values = (steps if name == "mismatch" else executed).groupby(["mode", "k"])[name]
        table[name] = values.mean()
        table[f"{name}_q25"] = values.quantile(0.25)
        table[f"{name}_q75"] = values.quantile(0.75)
        table[f"{name}_n"] = values.count()
        table[f"{name}_n"] = table[f"{name}_n"].fillna(0).astype(int)
    order = {mode: i for i, mode in enumerate(dict.fromkeys(steps["mode"]))}
    table = table.reset_index()
    table = table.sort_values(["mode", "k"], key=lambda c: c.map(order) if c.name == "mode" else c)
    return table.reset_index(drop=True)


def _check(name: str, table: pd.DataFrame, modes: list[str], columns: list[str]) -> None:
    """Refuse a table that lacks a mode, or has NaN in `columns`: pandas' averages would ignore it."""
    missing = [mode for mode in modes if mode not in set(table["mode"])]
    if missing or not modes:
        raise DataError(f"no {name} of {', '.join(missing) or 'any mode'}: run the evaluation again")
    for column in columns:
        if not np.isfinite(table[column].to_numpy(float)).all():
            raise DataError(
                f"the {name} hold a {column} that is not a number: the results are damaged, run again"
            )
