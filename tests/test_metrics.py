"""The statistics of the report, against cases worked out by hand."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from tdmpc2.errors import DataError
from tdmpc2.evaluation.metrics import (
    act_columns,
    act_times,
    by_step_in_plan,
    holds_up,
    mean_interval,
    paired_ratio,
    summarise,
    with_interval,
)


def episodes_of(**returns: list[float]) -> pd.DataFrame:
    rows = [
        {
            "mode": mode,
            "seed": 100 + i,
            "return": value,
            "length": 10,
            "terminated": False,
            "planner_calls": 10 if mode == "baseline" else 4,
            "fallbacks": 0 if mode == "baseline" else 1,
        }
        for mode, values in returns.items()
        for i, value in enumerate(values)
    ]
    return pd.DataFrame(rows)


STEPS = pd.DataFrame(
    {
        "mode": ["baseline", "fast", "fast", "fast"],
        "seed": 100,
        "t": [1, 0, 1, 2],
        "kind": ["planned", "planned", "corrected", "fallback"],
        "k": [0, 0, 1, 2],
        "mismatch": [np.nan, np.nan, 0.5, 2.0],
        "delta_a": [0.0, 0.0, 0.4, 0.0],
        "action_change": [1.5, np.nan, 0.2, 0.6],
        "reward": [1.0, 1.0, 0.0, 0.0],
        "teacher_distance": [np.nan, np.nan, np.nan, np.nan],
    }
)


def test_summary_of_a_small_case() -> None:
    episodes = episodes_of(baseline=[100.0, 200.0, 100.0, 200.0], fast=[90.0, 99.0, 100.0, 101.0])
    latency = pd.DataFrame(
        {
            "mode": ["baseline"] * 2 + ["fast"] * 2,
            "kind": ["planned"] * 2 + ["corrected"] * 2,
            "act_ms": [10.0, 30.0, 1.0, 3.0],
        }
    )
    fast = summarise(episodes, STEPS, latency).set_index("mode").loc["fast"]
    assert fast.return_mean == pytest.approx(97.5)
    assert fast.return_median == pytest.approx(99.5)
    assert fast.return_iqm == pytest.approx(99.5)  # the middle two of four
    assert fast.return_worst5 == 90.0
    assert fast.failure_rate == pytest.approx(0.25), "99 of 200 fails, 101 of 200 does not"
    assert fast.planner_calls == pytest.approx(0.4)
    assert fast.fallbacks == pytest.approx(0.1)
    assert fast.delta_a == pytest.approx(0.4), "planned steps and fallbacks have no correction"
    assert fast.action_change == pytest.approx(0.4), "an episode's first action changes nothing"
    assert fast.return_ratio == pytest.approx(390 / 600)
    assert (fast.act_ms_median, fast.act_ms_p99) == (3.0, 30.0)
    assert fast.act_ms_mean == pytest.approx(0.4 * 20.0 + 0.6 * 2.0)


def test_few_timed_steps_are_weighted_by_the_plans_of_all_episodes() -> None:
    """A mode plans in a tenth of its steps, and in half of the timed ones; another one in none of these."""
    latency = pd.DataFrame(
        {
            "mode": ["baseline", "a", "a", "b", "b"],
            "kind": ["planned", "fallback", "corrected", "corrected", "corrected"],
            "act_ms": [30.0, 20.0, 1.0, 1.0, 2.0],
        }
    )
    a = act_columns(*act_times(latency, "a", 0.1))
    assert a["act_ms_mean"] == pytest.approx(2.9) and (a["act_ms_median"], a["act_ms_p95"]) == (1.0, 20.0)
    b = act_columns(*act_times(latency, "b", 0.02))
    assert b["act_ms_mean"] == pytest.approx(0.98 * 1.5 + 0.02 * 30.0)
    assert (b["act_ms_p95"], b["act_ms_p99"]) == (2.0, 30.0)
    assert act_columns(*act_times(latency, "baseline", 1.0))["act_ms_median"] == 30.0
    assert act_columns(*act_times(latency, "b", 0.0))["act_ms_p99"] == 2.0


def test_order_of_seeds_does_not_matter_but_pairing_does() -> None:
    episodes = episodes_of(baseline=[1.0, 50.0, 100.0], fast=[1.0, 50.0, 100.0])
    shuffled = episodes.sample(frac=1, random_state=1).sort_values("mode", kind="stable")
    fast = summarise(shuffled, STEPS, None).set_index("mode").loc["fast"]
    # Returns differ wildly between seeds, but never from the baseline's: no uncertainty is left.
    assert (fast.return_ratio_low, fast.return_ratio_high) == pytest.approx((1.0, 1.0))
    swapped = episodes_of(baseline=[1.0, 50.0, 100.0], fast=[100.0, 50.0, 1.0])
    fast = summarise(swapped, STEPS, None).set_index("mode").loc["fast"]
    assert fast.return_ratio_high - fast.return_ratio_low > 1


def test_unpaired_seeds_are_refused() -> None:
    episodes = episodes_of(baseline=[1.0, 2.0], fast=[1.0, 2.0, 3.0])
    with pytest.raises(DataError, match="same seeds"):
        summarise(episodes, STEPS, None)
    broken = episodes_of(baseline=[1.0, 2.0], fast=[1.0, np.nan])
    with pytest.raises(DataError, match="not a number"):
        summarise(broken, STEPS, None)


def test_a_ratio_to_nothing_is_not_a_number() -> None:
    assert np.isnan(paired_ratio(np.ones(3), np.zeros(3))).all()
    ratio, low, high = paired_ratio(np.array([2.0]), np.array([1.0]))
    assert ratio == 2.0 and np.isnan([low, high]).all(), "one episode has no interval"


def test_interval_covers_the_truth() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for i in range(200):
        baseline = rng.normal(100, 10, 20)
        _, low, high = paired_ratio(0.9 * baseline + rng.normal(0, 5, 20), baseline, i)
        covered += low <= 0.9 <= high
    assert 0.86 <= covered / 200 <= 0.99


def test_by_step_in_plan_leaves_out_what_is_not_defined() -> None:
    table = by_step_in_plan(STEPS).set_index(["mode", "k"])
    assert table.loc[("fast", 1), "mismatch"] == 0.5
    assert table.loc[("fast", 0), "mismatch_n"] == 0
    assert list(table.loc["fast"].index) == [0, 1, 2]


def test_interval_of_a_small_case_worked_out_by_hand() -> None:
    # Two seeds have three pairs of resamples: (1, 1), (1, 2) and (2, 2), with probability 1/4, 1/2, 1/4;
    # with so few, the interval goes to the outermost.
    ratio, low, high = paired_ratio(np.array([50.0, 300.0]), np.array([100.0, 300.0]))
    assert (ratio, low, high) == pytest.approx((350 / 400, 0.5, 1.0))
    low, high = mean_interval(np.array([1.0, 3.0]))
    assert (low, high) == pytest.approx((1.0, 3.0))


def test_interval_of_a_mean_is_that_of_student() -> None:
    values = np.random.default_rng(1).normal(100, 10, 30)
    expected = stats.t.interval(0.95, 29, values.mean(), stats.sem(values))
    assert mean_interval(values) == pytest.approx(expected, abs=0.3)
    assert mean_interval(values) == mean_interval(values), "the same seed, the same interval"


def test_interval_of_ten_episodes_is_as_wide_as_that_of_student() -> None:
    """Percentiles that are not moved outwards by n / (n - 1) are 5 % narrower, plain ones by 18 %."""
    ratios = []
    for values in np.random.default_rng(0).normal(100, 10, (8, 10)):
        low, high = mean_interval(values)
        ratios.append((high - low) / (2 * stats.t.ppf(0.975, 9) * stats.sem(values)))
    assert 0.96 < np.mean(ratios) < 1.02


@pytest.mark.filterwarnings("error")
def test_interval_is_not_taken_from_the_resamples_that_happen_to_be_positive() -> None:
    ratio, low, high = paired_ratio(np.array([10.0, -1.0, 2.0]), np.array([10.0, -1.0, -2.0]))
    assert ratio == pytest.approx(11 / 7) and np.isnan([low, high]).all()


def test_failures_where_returns_are_negative() -> None:
    episodes = episodes_of(baseline=[-100.0, -100.0, 100.0, 0.0], fast=[-140.0, -160.0, -1.0, 0.0])
    fast = summarise(episodes, STEPS, None).set_index("mode").loc["fast"]
    assert fast.failure_rate == 0.5, "-160 is worse than -100 by more than half of 100, -140 is not"
    assert np.isnan([fast.return_ratio, fast.return_ratio_low, fast.return_ratio_high]).all()


def test_worst_five_percent() -> None:
    for n, expected in ((19, 0.0), (39, 0.0), (40, 0.5)):
        values = [float(v) for v in range(n)][::-1]
        assert summarise(episodes_of(baseline=values), STEPS.head(1), None).return_worst5[0] == expected


def test_no_average_hides_a_number_that_is_missing() -> None:
    episodes = episodes_of(baseline=[1.0, 2.0], fast=[1.0, 2.0])
    latency = pd.DataFrame({"mode": ["baseline", "fast"], "act_ms": [1.0, np.nan]})
    with pytest.raises(DataError, match="act_ms"):
        summarise(episodes, STEPS, latency)
    with pytest.raises(DataError, match="no latency of fast"):
        summarise(episodes, STEPS, latency.head(1))
    with pytest.raises(DataError, match="delta_a"):
        summarise(episodes, STEPS.assign(delta_a=np.nan), None)
    with pytest.raises(DataError, match="no steps of fast"):
        summarise(episodes, STEPS[STEPS["mode"] == "baseline"], None)
    with pytest.raises(DataError, match="no episodes"):
        summarise(episodes.head(0), STEPS, None)


def test_a_fallback_counts_where_it_was_seen_and_where_it_acted() -> None:
    steps = STEPS.assign(teacher_distance=[0.1, 0.2, 0.9, 0.4], reward=[1.0, 1.0, 0.0, 0.5])
    table = by_step_in_plan(steps).set_index(["mode", "k"])
    assert table.loc[("fast", 2), "mismatch"] == 2.0
    assert table.loc[("fast", 2), ["steps", "delta_a_n"]].tolist() == [0, 0]
    assert table.loc[("fast", 0), "steps"] == 2, "the planned step and the fallback's"
    assert table.loc[("fast", 0), "teacher_distance"] == pytest.approx(0.3)
    assert table.loc[("fast", 0), "reward"] == pytest.approx(0.75)
    assert table.loc[("fast", 1), "delta_a"] == pytest.approx(0.4)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_holds_up(sign: float) -> None:
    """1.5 % lost hold up, 4 % do not: by the ratio, or where returns are negative by the difference."""
    seeds = np.arange(10)
    base = sign * (100 + 0.1 * seeds)
    modes = {"baseline": base, "good": base - 1.5, "bad": base - 4.0}
    episodes = pd.concat(
        pd.DataFrame(
            {"mode": mode, "seed": seeds, "return": returns, "length": 5, "terminated": False,
             "planner_calls": 5, "fallbacks": 0}
        )
        for mode, returns in modes.items()
    )  # fmt: skip
    steps = pd.DataFrame(
        {"mode": list(modes), "kind": "planned", "k": 0, "delta_a": 0.0, "action_change": 0.0}
    )
    assert holds_up(summarise(episodes, steps, None), 0.98).tolist() == [True, True, False]


@pytest.mark.parametrize("kind", ["fallback", "prior"])
def test_what_begins_anew_counts_as_the_first_step(kind: str) -> None:
    columns = {"mismatch": [np.nan, 2.0], "delta_a": 0.0, "reward": [1.0, 3.0], "teacher_distance": 0.0}
    steps = pd.DataFrame({"mode": "m", "kind": ["planned", kind], "k": [0, 1], **columns})
    table = by_step_in_plan(steps).set_index("k")
    assert table["steps"].tolist() == [2, 0]
    assert table.loc[0, "reward"] == 2.0 and table.loc[1, "mismatch"] == 2.0


def test_planner_calls_are_a_share_of_all_steps() -> None:
    """Not a mean over episodes: one that ends early counts as long as it lasted."""
    episodes = episodes_of(baseline=[1.0, 1.0], fast=[1.0, 1.0])
    of_fast = episodes["mode"] == "fast"
    episodes.loc[of_fast, ["length", "planner_calls", "fallbacks"]] = [[90, 9, 0], [10, 5, 4]]
    episodes.loc[of_fast, "terminated"] = [False, True]
    fast = summarise(episodes, STEPS, None).set_index("mode").loc["fast"]
    assert (fast.planner_calls, fast.fallbacks) == pytest.approx((0.14, 0.04))
    assert fast.termination_rate == 0.5


def test_difference_to_the_baseline_is_paired() -> None:
    episodes = episodes_of(baseline=[1.0, 50.0, 100.0], fast=[0.0, 49.0, 99.0])
    fast = summarise(episodes, STEPS, None).set_index("mode").loc["fast"]
    assert fast.return_difference_low == pytest.approx(-1.0)


def test_means_and_quartiles_by_step_in_plan() -> None:
    values = [1.0, 2.0, 3.0, 4.0, 10.0]
    steps = pd.DataFrame({"mode": "fast", "kind": "corrected", "k": 1, "mismatch": values, "delta_a": values})
    steps = pd.concat([STEPS.assign(mode="zero"), steps.assign(reward=values, teacher_distance=values)])
    table = by_step_in_plan(steps)
    assert list(dict.fromkeys(table["mode"])) == ["zero", "fast"], "in the order of the steps"
    row = table.set_index(["mode", "k"]).loc[("fast", 1)]
    for name in ("mismatch", "delta_a", "reward", "teacher_distance"):
        assert row[[name, f"{name}_q25", f"{name}_q75", f"{name}_n"]].tolist() == [4.0, 2.0, 4.0, 5]


def test_what_is_uncertain_does_not_hold_up_and_the_baseline_always_does() -> None:
    baseline = [100.0, 100.0, 100.0, 100.0]
    episodes = episodes_of(baseline=baseline, sure=[99.0] * 4, unsure=[60.0, 140.0, 80.0, 120.0])
    columns = {"kind": "planned", "k": 0, "delta_a": 0.0, "action_change": 0.0}
    steps = pd.DataFrame({"mode": ["baseline", "sure", "unsure"], **columns})
    assert holds_up(summarise(episodes, steps, None), 0.98).tolist() == [True, True, False]
    one = episodes[episodes["seed"] == 100]  # an episode each, so no interval
    assert holds_up(summarise(one, steps, None), 0.5).tolist() == [True, False, False]


def test_a_ratio_as_text() -> None:
    assert with_interval(0.98765, 0.9, 1.05) == "0.988 [0.900, 1.050]"
    assert with_interval(0.98765, np.nan, np.nan) == "0.988"
