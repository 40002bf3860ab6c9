"""The report holds what it should, for every kind of result, and nothing that comes from outside."""

import re
from io import StringIO
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from rich.console import Console

from tdmpc2.evaluation.metrics import summarise
from tdmpc2.evaluation.report import headline, in_terminal, notes, styles, write_report
from tdmpc2.progress import Progress

Tables = tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]
META = {
    "task": "walker-walk",
    "teacher": "0123abcd",
    "command": "python scripts/eval_corrector.py out=<here>",
    "seeds": [7, 8, 9, 10],
    "planner": {"num_samples": 512, "iterations": 6},
    "validation": [{"corrector": "two_tower", "error": 0.0125, "plan_error": 0.5, "prior_error": 0.75}],
}


def results(names: list[str], seeds: int = 4, length: int = 6, distance: float = 0.2) -> Tables:
    """Small but complete results; every later mode loses 4 % of the baseline's return."""
    rng = np.random.default_rng(0)
    episodes, steps, latency = [], [], []
    for i, mode in enumerate(names):
        horizon = 1 if mode in ("baseline", "prior") else 3
        for seed in range(7, 7 + seeds):
            value = (100.0 + 5 * seed) * (1 - 0.04 * i) + rng.normal()
            episodes.append((mode, seed, value, length, False, length // horizon, 0))
            for t in range(length):
                k = t % horizon
                kind, delta = ("corrected", 0.1) if k else ("prior" if mode == "prior" else "planned", 0.0)
                drift = 0.5 * k if k else np.nan
                change = np.nan if t == 0 else 0.3
                steps.append((mode, seed, t, kind, k, drift, delta, change, value / length, distance))
        latency += [(mode, t, "planned", (1.0 if t % horizon else 40.0) + rng.random()) for t in range(9)]
    columns = "mode seed t kind k mismatch delta_a action_change reward teacher_distance"
    return (
        pd.DataFrame(
            episodes, columns=["mode", "seed", "return", "length", "terminated", "planner_calls", "fallbacks"]
        ),
        pd.DataFrame(steps, columns=columns.split()),
        pd.DataFrame(latency, columns=["mode", "t", "kind", "act_ms"]),
    )


def report(folder: Path, tables: Tables, **meta: object) -> str:
    episodes, steps, latency = tables
    summary = summarise(episodes, steps, latency)
    return write_report(folder, episodes, steps, summary, META | meta).read_text(encoding="utf-8")


def test_report_is_complete_and_on_its_own(tmp_path: Path) -> None:
    modes = ["baseline", "naive_3", "two_tower_6", "prior"]
    html = report(tmp_path, results(modes), chosen="naive_3")
    for mode in modes:
        assert f"<td>{mode}</td>" in html
    assert html.count("<svg") == html.count("<figcaption>") == 8
    assert "not measured" not in html
    assert html.count('class="chosen"><td>naive_3</td>') == 1
    for shown in ("0123abcd", "7 to 10", "num_samples = 512, iterations = 6", "0.0125", "0.75"):
        assert shown in html
    assert "://" not in html and "<script" not in html and "@import" not in html
    links = re.findall(r"""(?:href|src)=["']?([^"' >]+)""", html) + re.findall(r"url\(([^)]+)\)", html)
    assert links and all(link.startswith(("#", "data:image/png;base64,")) for link in links)
    assert not list(tmp_path.glob("*.tmp"))


def test_published_modes_are_shown_step_by_step(tmp_path: Path) -> None:
    tables = results(["baseline", "two_tower_6", "two_tower_6_refined"], distance=0.25)
    html = report(tmp_path, tables)
    mean = summarise(*tables)["return_mean"].iloc[1]
    rows = re.findall(r"<tr><td>two_tower_6 \((.*?)\)</td>(.*?)</tr>", html)
    assert [row[0] for row in rows] == [f"mean return {mean:.1f}"] * 3
    cells = [re.findall("<td>(.*?)</td>", row[1]) for row in rows]
    reward = f"{mean / 6:.3f}"
    assert cells[0] == ["t+1", "–", "0.000", reward, "0.250"]
    assert cells[2] == ["t+3", "1.000", "0.100", reward, "0.250"]
    assert "two_tower_6_refined (" not in html


def test_the_figure_of_times_is_the_table_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both weigh the timed steps by the planner calls of all episodes."""
    drawn = []
    plot = Axes.plot
    monkeypatch.setattr(Axes, "plot", lambda self, *a, **k: drawn.append(a) or plot(self, *a, **k))
    tables = results(["baseline", "fast"])
    report(tmp_path, tables)
    row = summarise(*tables).iloc[1]
    for name in ("median", "mean", "p95", "p99"):
        assert (row[f"act_ms_{name}"], 1) in [a[:2] for a in drawn if np.isscalar(a[0])]


def test_the_same_results_give_the_same_file(tmp_path: Path) -> None:
    tables = results(["baseline", "fast"])
    assert report(tmp_path, tables) == report(tmp_path, tables)


def test_names_are_text_and_nothing_else(tmp_path: Path) -> None:
    bad = "<b onclick=x>&$\\alpha$"
    html = report(tmp_path, results(["baseline", bad]), task="<script>alert(1)</script>", chosen=bad)
    assert "<script" not in html and "<b onclick" not in html
    assert "&lt;script&gt;" in html and "&lt;b onclick=x&gt;&amp;$\\alpha$" in html
    assert "out=&lt;here&gt;" in html


def test_headline_says_whether_the_requirement_is_met() -> None:
    summary = summarise(*results(["baseline", "good", "worse"], seeds=12, length=30))
    text = headline(summary, {"min_return": 0.94})
    assert text.startswith("good has the fewest planner calls") and "end meets the required 94.0%" in text
    assert "95.9% of the baseline's return" in text and "in 33.3% of the steps" in text
    text = headline(summary, {"min_return": 0.94, "chosen": "worse"})
    assert text.startswith("worse was chosen on the calibration seeds") and "does not meet" in text
    assert "On held-out seeds it keeps" in text and "flatters" not in text
    assert "replans at every step" in headline(summary, {"min_return": 0.99})
    for meta in ({"chosen": "baseline"}, {"chosen": "baseline", "min_return": 0.94}):
        assert "replans at every step" in headline(summary, meta)
    assert headline(summary, {}).startswith("3 modes on the same 12 episodes")


@pytest.mark.filterwarnings("error")
def test_one_episode(tmp_path: Path) -> None:
    tables = results(["baseline", "fast"], seeds=1)
    html = report(tmp_path, tables, chosen="fast", min_return=0.9)
    assert "With one episode there are no intervals." in html
    assert "nan" not in re.sub(r"<svg.*?</svg>", "", html, flags=re.DOTALL)


@pytest.mark.filterwarnings("error")
def test_a_baseline_without_return(tmp_path: Path) -> None:
    episodes, steps, latency = results(["baseline", "fast"])
    episodes["return"] = 0.0
    html = report(tmp_path, (episodes, steps, latency), chosen="fast", min_return=0.9)
    assert "a ratio to it says nothing" in html
    assert "its mean return is 0.0, baseline&#39;s 0.0" in html
    assert "nan" not in re.sub(r"<svg.*?</svg>", "", html, flags=re.DOTALL)


@pytest.mark.parametrize(("lost", "met"), [(1.0, "meets"), (4.0, "does not meet")])
def test_headline_where_returns_are_negative(lost: float, met: str) -> None:
    episodes, steps, latency = results(["baseline", "fast"], seeds=12)
    fast = episodes["mode"] == "fast"
    episodes["return"] = -100.0 - lost * fast
    summary = summarise(episodes, steps, latency)
    text = headline(summary, {"min_return": 0.98, "chosen": "fast"})
    assert f"its mean return is {-100 - lost:.1f}, baseline's -100.0" in text
    assert f"of the difference, {-lost:.1f}, {met} the required -2.0" in text
    meta = {"min_return": 0.98, "chosen": "baseline", "why": "none keeps 0.95 of it where both are pushed"}
    text = "none keeps 0.95 of it where both are pushed."
    assert headline(summary, meta) == f"The agent replans at every step: {text}"


@pytest.mark.filterwarnings("error")
def test_identical_returns_and_no_distance_to_the_teacher(tmp_path: Path) -> None:
    episodes, steps, latency = results(["baseline", "fast"], seeds=10, distance=np.nan)
    episodes["return"] = 1000.0
    html = report(tmp_path, (episodes, steps, latency), chosen="fast")
    assert "1.000 [1.000, 1.000]" in html
    assert "distance to the teacher&#39;s action was not measured" in html


def test_notes() -> None:
    episodes, steps, latency = results(["baseline", "fast"], seeds=20)
    steps.loc[steps["seed"] > 8, "teacher_distance"] = np.nan
    found = notes(summarise(episodes, steps, latency), steps)
    assert len(found) == 2
    assert "No failure among 20 episodes" in found[0] and "13.9 %" in found[0]  # 0.861^20 = 0.05
    assert found[1].endswith("measured on 2 of 20 episodes.")


def test_every_mode_has_a_look_of_its_own() -> None:
    table = styles([f"mode_{i}" for i in range(14)])
    assert len(set(table.values())) == 14
    assert table["mode_0"].color == "#000000"


def test_table_fits_the_terminal() -> None:
    names = ["baseline", "[bold]naive_3", "temporal_6", "the_distilled_policy_alone"]
    summary = summarise(*results(names, seeds=3))
    summary[["return_mean", "return_worst5"]] = 1234.5
    out = StringIO()
    Progress(Console(file=out, width=60)).table(in_terminal(summary))
    text = out.getvalue()
    assert max(map(len, text.splitlines())) <= 110
    assert all(name in text for name in names) and "…" not in text, "a narrow terminal loses nothing"
    row = next(line for line in text.splitlines() if "temporal_6" in line)
    for name in ("return_ratio", "return_ratio_low", "return_ratio_high"):
        assert f"{summary[name].iloc[2]:.3f}" in row
    assert re.search(rf"{summary['act_ms_p99'].iloc[2]:.1f}\s*$", row)
