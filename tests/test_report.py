"""The report holds what it should, for every kind of result, and nothing that comes from outside."""

import re
from html import unescape
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from tdmpc2.config import SpeculationConfig
from tdmpc2.evaluation.metrics import by_step_in_plan, summarise
from tdmpc2.evaluation.report import describe, in_terminal, notes, reasons, verdict, write_report
from tdmpc2.files import write_json
from tdmpc2.progress import Progress

Tables = tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]
META = {
    "task": "walker-walk",
    "teacher": "0123abcd",
    "command": "tdmpc2 compare out=<here>",
    "seeds": "7 to 10",
    "planner": {"num_samples": 512, "iterations": 6},
    "validation": [{"corrector": "two_tower", "error": 0.0125, "plan_error": 0.5, "prior_error": 0.75}],
    "why": "it takes the least time",
    "min_return": 0.98,
    "min_return_pushed": 0.95,
}
VOID = {"meta", "input", "br", "path", "use", "rect"}


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
                mismatch = 0.5 * k if k else np.nan
                change = np.nan if t == 0 else 0.3
                steps.append((mode, seed, t, kind, k, mismatch, delta, change, value / length, distance))
        latency += [(mode, t, "planned", (1.0 if t % horizon else 40.0) + rng.random()) for t in range(9)]
    columns = "mode seed t kind k mismatch delta_a action_change reward teacher_distance"
    return (
        pd.DataFrame(
            episodes, columns=["mode", "seed", "return", "length", "terminated", "planner_calls", "fallbacks"]
        ),
        pd.DataFrame(steps, columns=columns.split()),
        pd.DataFrame(latency, columns=["mode", "t", "kind", "act_ms"]),
    )


def calibrated(folder: Path, summary: pd.DataFrame, pushed: pd.DataFrame | None = None) -> Path:
    """The folder `calibration`, with the modes that were tried, and those that were tried under pushes."""
    for name, table in (("modes", summary), ("pushed", pushed)):
        if table is not None:
            (folder / "calibration" / name).mkdir(parents=True, exist_ok=True)
            table.to_csv(folder / "calibration" / name / "summary.csv", index=False)
    return folder / "calibration"


def report(folder: Path, tables: Tables, chosen: str, **meta: object) -> str:
    """The report on what an evaluation with these results leaves in `folder`."""
    episodes, steps, latency = tables
    summary = summarise(episodes, steps, latency)
    calibrated(folder, summary)
    steps_in_plan = by_step_in_plan(steps)
    written = {"episodes": episodes, "steps": steps, "summary": summary, "by_step_in_plan": steps_in_plan}
    for name, table in written.items():
        table.to_csv(folder / f"{name}.csv", index=False)
    modes = {mode: {"execution_horizon": 3} for mode in summary["mode"]}
    write_json(folder / "provenance.json", {**META, "modes": modes, "chosen": chosen, **meta})
    return write_report(folder).read_text(encoding="utf-8")


def without_markup(html: str) -> str:
    """The text of a page outside of its figures."""
    body = re.sub(r"<(svg|script|style).*?</\1>", "", html, flags=re.DOTALL)
    return re.sub(r"\s+", " ", unescape(re.sub("<[^>]+>", "", body)))


class Nesting(HTMLParser):
    """Checks that every element that is opened is closed, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag


def test_report_is_complete_and_on_its_own(tmp_path: Path) -> None:
    modes = ["baseline", "naive_3", "two_tower_3", "two_tower_6", "temporal_6", "plan_3", "prior"]
    html = report(tmp_path, results(modes), chosen="two_tower_3")
    for mode in modes:
        assert f"<td>{mode}</td>" in html and f"<b>{mode}</b>" in html
    for question in (
        "What do I gain?",
        "What does it cost in return?",
        "When does it plan?",
        "Where does it fail?",
    ):
        assert f"<h3>{question}</h3>" in html
    assert html.count("<svg") == 4, "two of the questions, a typical episode and the worst"
    assert html.count('class="chosen"><td>two_tower_3</td>') == 1
    for shown in ("0123abcd", "7 to 10", "num_samples = 512, iterations = 6", "0.0125", "0.75"):
        assert shown in html
    assert "://" not in html and "<link" not in html and "@import" not in html and "src=" not in html
    links = re.findall(r"""href=["']?([^"' >]+)""", html) + re.findall(r"url\(([^)]+)\)", html)
    assert links and all(link.startswith("#") for link in links)
    assert not list(tmp_path.glob("*.tmp"))
    page = Nesting()
    page.feed(html)
    assert page.open == []


def test_rivals_are_in_colour_and_the_rest_has_a_switch(tmp_path: Path) -> None:
    modes = ["baseline", "naive_3", "naive_6", "two_tower_3", "two_tower_6", "temporal_6", "prior"]
    html = report(tmp_path, results(modes), chosen="two_tower_6")
    boxes = re.findall(r'<input type="checkbox" data-mode="(m\d)"( checked)?><span><b>(\w+)</b>', html)
    on = [name for _, checked, name in boxes if checked]
    assert on == ["baseline", "two_tower_6", "two_tower_3", "naive_3"], (
        "the best other, and the best simpler one"
    )
    assert {name for *_, name in boxes} == set(modes)
    figures = re.findall("<figure>.*?</figure>", html, flags=re.DOTALL)
    for tag, checked, name in boxes:
        assert all(f'class="row {tag}"' in figure for figure in figures[:2]), name
        drawn = [f'<g class="{tag}">' in figure for figure in figures[2:4]]
        assert drawn == [name not in ("baseline", "prior"), name != "baseline"], name
        row = re.search(rf'class="row {tag}" style="--c: (.*?)"', html)
        assert row is not None and (row[1] == "var(--grey)") == (not checked), name


def test_the_verdict_and_the_figures_have_the_table_s_numbers(tmp_path: Path) -> None:
    """There is one definition of times, returns and planner calls."""
    tables = results(["baseline", "fast"], seeds=12, length=30)
    html = report(tmp_path, tables, chosen="fast", min_return=0.9)
    table = re.search('<tr class="chosen"><td>fast</td>(.*?)</tr>', html)
    assert table is not None
    cells = dict(zip(COLUMNS_OF_TABLE, re.findall("<td>(.*?)</td>", table[1]), strict=True))
    baseline, row = (r for _, r in summarise(*tables).iterrows())
    factor = f"{baseline['act_ms_mean'] / row['act_ms_mean']:.1f} times as fast"
    text = without_markup(html)
    assert (
        f"fast is {factor} as the teacher and keeps {100 * row['return_ratio']:.1f} % of its return." in text
    )
    assert cells["ratio"].startswith(f"{row['return_ratio']:.3f} [") and cells["calls"] == "33.3 %"
    assert f"One step takes {cells['mean ms']} ms on average" in text
    assert f"take {cells['p99']} ms or more" in text
    assert f"calls the planner in {cells['calls']} of the steps" in text
    assert f"<span>{cells['mean ms']} ms, {factor}</span>" in html
    share = 100 * row["act_ms_mean"] / baseline["act_ms_mean"]
    assert re.findall(r'class="bar" style="width: (.*?)%', html) == ["100.0", f"{share:.1f}"]
    assert f"<span>{cells['ratio']}</span>" in html


COLUMNS_OF_TABLE = [
    *("return", "median", "iqm", "worst", "ratio", "failures", "terminated", "calls", "fallbacks"),
    *("correction", "change", "median ms", "p95", "p99", "mean ms"),
]


def test_marks_of_the_return_are_in_order(tmp_path: Path) -> None:
    html = report(tmp_path, results(["baseline", "good", "worse"], seeds=12), chosen="good")
    required, one = (
        float(re.search(rf'class="{name}" style="left: (.*?)%', html)[1])  # type: ignore[index]
        for name in ("least", "one")
    )
    found = re.findall(
        r'"range" style="left: (.*?)%; right: (.*?)%"></i><i class="point" style="left: (.*?)%', html
    )
    marks = [(float(left), float(point), 100 - float(right)) for left, right, point in found]
    assert marks[0] == pytest.approx((one, one, one))
    assert 0 <= marks[2][0] < marks[2][1] < marks[2][2] < marks[1][0] < required < one < 100


def test_published_modes_are_shown_step_by_step(tmp_path: Path) -> None:
    tables = results(["baseline", "two_tower_6", "two_tower_6_refined", "other"], distance=0.25)
    html = report(tmp_path, tables, chosen="other")
    mean = summarise(*tables)["return_mean"].iloc[1]
    table = re.search(rf"<h3>two_tower_6, mean return {mean:.1f}</h3>(.*?)</table>", html, flags=re.DOTALL)
    assert table is not None
    rows = [re.findall("<td>(.*?)</td>", row) for row in re.findall("<tr>(.*?)</tr>", table[1])]
    reward = f"{mean / 6:.3f}"
    assert rows[1] == ["0", "–", "0.000", reward, "0.250"]
    assert rows[3] == ["2", "1.000", "0.100", reward, "0.250"]
    assert "<h3>other, mean return" in html and "<h3>two_tower_6_refined" not in html


def test_the_worst_episode_is_beside_a_typical_one(tmp_path: Path) -> None:
    episodes, steps, latency = results(["baseline", "fast"], seeds=5)
    fast = episodes["mode"] == "fast"
    episodes.loc[fast & (episodes["seed"] == 9), "return"] = 12.5
    html = report(tmp_path, (episodes, steps, latency), chosen="fast")
    assert "The worst episode: seed 9, return 12.5" in html
    typical = re.search(r"A typical episode: seed (\d+)", html)
    assert typical is not None and typical[1] != "9"
    base = episodes.loc[~fast & (episodes["seed"] == 9), "return"].iloc[0]
    assert "fast fails in 20.0 % of the episodes" in html and f"return 12.5, baseline has {base:.1f}" in html


def test_the_same_results_give_the_same_file(tmp_path: Path) -> None:
    tables = results(["baseline", "fast"])
    assert report(tmp_path, tables, chosen="fast") == report(tmp_path, tables, chosen="fast")


def test_names_are_text_and_nothing_else(tmp_path: Path) -> None:
    bad = "<b onclick=x>&$\\alpha$"
    attack = "<script>alert(1)</script>"
    html = report(tmp_path, results(["baseline", bad]), chosen=bad, task=attack, why=attack, machine=attack)
    assert html.count("<script") == 1 and "<b onclick" not in html
    assert "&lt;script&gt;" in html and "&lt;b onclick=x&gt;&amp;$\\alpha$" in html
    assert "out=&lt;here&gt;" in html


def test_verdict_says_whether_the_requirement_is_met() -> None:
    summary = summarise(*results(["baseline", "good", "worse"], seeds=12, length=30))
    lead, *rest = verdict(summary, {**META, "min_return": 0.94, "chosen": "good"})
    assert re.fullmatch(r"good is 2\.\d times as fast as the teacher and keeps 95.9 % of its return.", lead)
    assert "Its lower end must be at least 94.0 %, and it is." in " ".join(rest)
    text = " ".join(verdict(summary, {**META, "min_return": 0.94, "chosen": "worse"}))
    assert "Its lower end must be at least 94.0 %, and it is not." in text
    assert text.endswith("The mode was chosen on other episodes: it takes the least time.")
    lead, reason = verdict(summary, {**META, "chosen": "baseline", "why": "none is fast"})
    assert lead.startswith("No faster mode was chosen.") and reason == "The reason: none is fast."


@pytest.mark.filterwarnings("error")
def test_nothing_is_chosen(tmp_path: Path) -> None:
    """The report then shows the mode that came closest, and why it was not chosen."""
    tables = results(["baseline", "half_budget", "two_tower_3", "two_tower_6"])
    html = report(tmp_path, tables, chosen="baseline", why="no mode holds 0.98 of the return")
    text = without_markup(html)
    assert "The agent plans at every step" in text and "no mode holds 0.98 of the return" in text
    assert "Mode two_tower_3, the best mode that was not chosen" in text
    assert "Its interval allows a loss of more than 2.0 % of the return." in text
    assert html.count("<svg") == 4


@pytest.mark.filterwarnings("error")
def test_modes_that_never_speculate_leave_no_empty_figure(tmp_path: Path) -> None:
    html = report(tmp_path, results(["baseline", "prior"], distance=np.nan), chosen="baseline")
    assert html.count("<svg") == 3 and "When does it plan?" in html, "there are no plans to be shown"
    assert "not measured" not in html and "<th>distance to the teacher" not in html


@pytest.mark.filterwarnings("error")
def test_one_episode(tmp_path: Path) -> None:
    tables = results(["baseline", "fast"], seeds=1)
    html = report(tmp_path, tables, chosen="fast", min_return=0.9)
    assert "One episode gives no interval." in html and "95 % interval of" not in html
    assert html.count("The worst episode") == 1 and "A typical episode" not in html
    assert "nan" not in without_markup(html) and "nan%" not in html


@pytest.mark.filterwarnings("error")
def test_a_baseline_without_return(tmp_path: Path) -> None:
    episodes, steps, latency = results(["baseline", "fast"])
    episodes["return"] = 0.0
    html = report(tmp_path, (episodes, steps, latency), chosen="fast", min_return=0.9)
    assert "there is no return ratio" in html
    assert "Its mean return is 0.0, the teacher&#39;s 0.0" in html
    assert "nan" not in without_markup(html) and "nan%" not in html


@pytest.mark.parametrize(("lost", "met"), [(1.0, "it is"), (4.0, "it is not")])
def test_verdict_where_returns_are_negative(lost: float, met: str) -> None:
    episodes, steps, latency = results(["baseline", "fast"], seeds=12)
    fast = episodes["mode"] == "fast"
    episodes["return"] = -100.0 - lost * fast
    summary = summarise(episodes, steps, latency)
    text = " ".join(verdict(summary, {**META, "chosen": "fast"}))
    assert f"Its mean return is {-100 - lost:.1f}, the teacher's -100.0." in text
    assert f"of the return difference begins at {-lost:.1f}. It must be at least -2.0, and {met}." in text


@pytest.mark.filterwarnings("error")
def test_identical_returns(tmp_path: Path) -> None:
    episodes, steps, latency = results(["baseline", "fast"], seeds=10)
    episodes["return"] = 1000.0
    assert "1.000 [1.000, 1.000]" in report(tmp_path, (episodes, steps, latency), chosen="fast")


def test_notes() -> None:
    summary = summarise(*results(["baseline", "fast"], seeds=20))
    (found,) = notes(summary, META)
    assert "without a failure in 20 episodes" in found and "13.9 %" in found  # 0.861^20 = 0.05
    summary = summarise(*results(["baseline", "prior"], seeds=3))
    assert notes(summary, {**META, "min_return": 0.5})[:2] == [
        "Simpler modes kept their return on these episodes too: prior.",
        "3 episodes are few: the intervals are too narrow. Use 10 or more.",
    ]


def test_reasons(tmp_path: Path) -> None:
    names = ["baseline", "naive_3", "chosen", "lossy", "fragile", "slow", "late"]
    summary = summarise(*results(names, seeds=12))
    tried = summary[summary["mode"].isin(["baseline", "chosen", "lossy", "fragile", "slow"])]
    tried = tried.assign(return_ratio_low=[1.0, 0.99, 0.91, 0.99, 0.985])
    pushed = summary.iloc[[0, 2, 4]].assign(return_mean=[100.0, 96.0, 94.0], return_ratio=[1.0, 0.96, 0.94])
    folder = calibrated(tmp_path, tried, pushed)
    why = {row["mode"]: row["why"] for row in reasons(folder, summary, {**META, "chosen": "chosen"})}
    assert list(why) == ["lossy", "fragile", "slow", "naive_3", "late"]
    assert why["lossy"] == "Its interval allows a loss of more than 2.0 % of the return."
    assert why["fragile"] == "It loses more than 5.0 % of the return under pushes."
    assert why["slow"].startswith("It keeps the return too. chosen is faster")
    assert why["naive_3"].startswith("A simpler method") and why["late"].startswith("Not tried. Even")
    rows = {row["mode"]: row for row in reasons(folder, summary, {**META, "chosen": "chosen"})}
    assert rows["fragile"]["pushed"].startswith("0.940") and rows["lossy"]["pushed"] == "–"
    assert (
        rows["lossy"]["ratio"]
        == f"{tried['return_ratio'].iloc[2]:.3f} [0.910, {tried['return_ratio_high'].iloc[2]:.3f}]"
    )
    nothing = reasons(calibrated(tmp_path / "fails", summary[:1]), summary, {**META, "chosen": "baseline"})
    assert [row["mode"] for row in nothing] == ["naive_3", "chosen, lossy, fragile, slow, late"]
    assert nothing[1]["why"] == "Not tried, for the reason in the verdict."


def test_a_mode_in_plain_words() -> None:
    words = describe(SpeculationConfig(6, (0.1, 0.2), "two_tower", refine_steps=1))
    assert words == (
        "Executes 6 steps of each plan; the corrector two_tower changes all but the first. A short search in "
        "the world model refines the action. Falls back to a new plan when the mismatch is too large."
    )
    assert describe(SpeculationConfig(3)) == "Executes 3 steps of each plan as planned."
    assert describe(SpeculationConfig(1)) == "Plans at every step (the teacher itself)."
    half = describe(SpeculationConfig(1, iterations=3))
    assert half == "Plans at every step (iterations of the planner: 3)."
    prior = SpeculationConfig(1, plan_length=0)
    assert describe(prior) == "Never plans: the policy prior acts alone."
    distilled = SpeculationConfig(1, None, "distilled", plan_length=0)
    assert describe(distilled) == "Never plans: the corrector distilled acts alone."


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
