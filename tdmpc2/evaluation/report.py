"""The report: one self-contained HTML file, and a table for the terminal."""

import io
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from ..config import SpeculationConfig
from ..files import atomic_write, read_json
from ..progress import Table
from .metrics import PLANS, holds_up, with_interval
from .modes import PAPER_HORIZONS, SIMPLER

COLUMNS = {
    "mode": "mode",
    "return_mean": "return, mean",
    "return_median": "median",
    "return_iqm": "IQM",
    "return_worst5": "worst 5 %",
    "return_ratio": "return ratio [95 %]",
    "failure_rate": "failures",
    "termination_rate": "terminated",
    "planner_calls": "planner calls",
    "fallbacks": "fallbacks",
    "delta_a": "correction",
    "action_change": "action change",
    "act_ms_median": "act ms, median",
    "act_ms_p95": "p95",
    "act_ms_p99": "p99",
    "act_ms_mean": "act ms, mean",
}
PERCENT = {"failure_rate", "termination_rate", "planner_calls", "fallbacks"}
IN_TERMINAL = {
    "mode": "mode",
    "return_mean": "return\nmean",
    "return_worst5": "worst\n5 %",
    "return_ratio": "return ratio\n[95 %]",
    "planner_calls": "planner\ncalls",
    "fallbacks": "fall-\nbacks",
    "delta_a": "correc-\ntion",
    "act_ms_median": "act ms\nmedian",
    "act_ms_mean": "\nmean",
    "act_ms_p99": "\np99",
}
BY_STEP = {
    "mismatch": "mismatch",
    "delta_a": "correction",
    "reward": "reward",
    "teacher_distance": "distance to the teacher's action",
}
PROVENANCE = {  # first in the report, under these names
    "teacher": "teacher (hash)",
    "command": "command",
    "commit": "commit",
    "date": "date",
    "seeds": "seeds",
    "calibration_seeds": "calibration seeds",
    "planner": "planning budget",
    "machine": "machine",
    "versions": "versions",
    "trained": "data and correctors",
}
FEW = 10  # with fewer episodes, the report says that the intervals are too narrow
# The colours of figures (Okabe and Ito's, safe for colour-blind readers). The page replaces each with its own
# colour for light or dark.
TEXT, GREY, FALLBACK = "#010101", "#909090", "#d55e00"
RIVALS = ("#0072b2", "#009e73", "#cc79a7")  # the first is the chosen mode's
INKS = {
    TEXT: "currentColor",
    GREY: "var(--grey)",
    FALLBACK: "var(--orange)",
    **dict(zip(RIVALS, ("var(--blue)", "var(--green)", "var(--pink)"), strict=True)),
}
DRAWING: dict[Any, Any] = {
    "svg.hashsalt": "report",  # equal names of a figure's parts in every run
    "svg.fonttype": "none",  # text stays text
    "font.size": 11,
    **dict.fromkeys(["text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"], TEXT),
    **dict.fromkeys(["axes.spines.top", "axes.spines.right"], False),
    **dict.fromkeys(["figure.facecolor", "axes.facecolor"], "none"),
}


class Mode(NamedTuple):
    """A mode on the page."""

    name: str
    tag: str  # the class of its elements
    color: str  # GREY: hidden until the reader switches it on
    words: str
    cells: Mapping[str, str]  # of the table
    speed: str  # factor to the baseline
    bar: float  # mean time of an action, in % of the longest
    marks: tuple[float, ...]  # return: lower end, mean and upper end, in % of the axis

    @property
    def ink(self) -> str:
        return INKS[self.color]


def write_report(folder: Path) -> Path:
    """Write `folder/report.html`, which needs no other file.

    Args:
        folder: of a finished evaluation, see `evaluate`: its tables, `provenance.json` and `calibration/`.

    Returns:
        The file.
    """
    meta = read_json(folder / "provenance.json")
    tables = ("episodes", "steps", "summary", "by_step_in_plan")
    episodes, steps, summary, by_k = (pd.read_csv(folder / f"{name}.csv") for name in tables)
    rivals = _rivals(summary, meta)
    modes, axis = _modes(summary, meta, rivals)
    subject = meta["chosen"] if meta["chosen"] != modes[0].name else rivals[min(1, len(rivals) - 1)]
    own = episodes[episodes["mode"] == subject].set_index("seed")
    baseline = episodes[episodes["mode"] == modes[0].name].set_index("seed")["return"]
    by_loss = (own["return"] - baseline).sort_values(kind="stable").index  # seeds, the worst first
    environment = Environment(
        loader=PackageLoader("tdmpc2", "evaluation"), autoescape=True, undefined=StrictUndefined
    )
    html = environment.get_template("report.html.j2").render(
        task=meta["task"],
        modes=modes,
        chosen=meta["chosen"],
        subject=next(mode for mode in modes if mode.name == subject),
        colored=len(rivals),
        verdict=verdict(summary, meta),
        notes=notes(summary, meta),
        axis=axis,
        seeds=_words(meta["seeds"]),
        episodes=len(own),
        min_return=meta["min_return"],
        when=_when(steps, modes, subject),
        where=_where(episodes, modes, by_loss),
        own=own,
        baseline=baseline,
        timelines={
            seed: _timeline(steps[(steps["mode"] == subject) & (steps["seed"] == seed)])
            for seed in dict.fromkeys([by_loss[len(own) // 2], by_loss[0]])
        },
        reasons=reasons(folder / "calibration", summary, meta),
        columns=COLUMNS,
        steps_in_plan=_steps_in_plan(by_k, summary, subject),
        by_step=BY_STEP,
        labelled=steps.loc[steps["teacher_distance"].notna(), "seed"].nunique(),
        validation=meta["validation"],
        settings={name: _words(mode) for name, mode in meta["modes"].items()},
        provenance=_provenance(meta),
    )
    path = folder / "report.html"
    with atomic_write(path) as tmp:
        tmp.write_text(html, encoding="utf-8")
    return path


def in_terminal(summary: pd.DataFrame) -> Table:
    """The columns of the summary that fit a terminal, within 100 columns."""
    rows = [_cells(row) for _, row in summary.iterrows()]
    return Table([*IN_TERMINAL.values()], [[cells[name] for name in IN_TERMINAL] for cells in rows])


def verdict(summary: pd.DataFrame, meta: Mapping[str, Any]) -> list[str]:
    """Sentences on the result of the chosen mode, the most important first.

    Args:
        summary: from `metrics.summarise`, with times.
        meta: uses `chosen` (a mode), `why` it was chosen, and `min_return`.
    """
    baseline, required = summary.iloc[0], meta["min_return"]
    row = summary.set_index("mode").loc[meta["chosen"]]
    if row.name == baseline["mode"]:
        return [
            "No faster mode was chosen. The agent plans at every step, as the teacher does.",
            f"The reason: {meta['why']}.",
        ]
    faster = f"{row.name} is {_factor(baseline.act_ms_mean / row.act_ms_mean)} times as fast as the teacher"
    if np.isnan(row.return_ratio):
        lead = (
            f"{faster}. Its mean return is {row.return_mean:.1f}, the teacher's {baseline.return_mean:.1f}."
        )
        low, least = row.return_difference_low, -(1 - required) * abs(baseline.return_mean)
        interval = f"of the return difference begins at {low:z.1f}. It must be at least {least:z.1f}"
    else:
        lead = f"{faster} and keeps {_percent(row.return_ratio)} of its return."
        low, least = row.return_ratio_low, required
        ends = f"{_percent(low)} to {_percent(row.return_ratio_high)}"
        interval = f"of that share is {ends}. Its lower end must be at least {_percent(least)}"
    sentences = [
        lead,
        f"One step takes {_number(row.act_ms_mean)} ms on average; the teacher takes "
        f"{_number(baseline.act_ms_mean)} ms.",
        f"The agent calls the planner in {_percent(row.planner_calls)} of the steps.",
        f"The slowest 1 % of the steps take {_number(row.act_ms_p99)} ms or more; with the teacher, "
        f"{_number(baseline.act_ms_p99)} ms.",
    ]
    if not np.isnan(low):
        met = "it is" if low >= least else "it is not"
        sentences.append(f"The 95 % interval {interval}, and {met}.")
    return [*sentences, f"The mode was chosen on other episodes: {meta['why']}."]


def notes(summary: pd.DataFrame, meta: Mapping[str, Any]) -> list[str]:
    """Notes that a careful reader needs for these numbers."""
    n, found = int(summary["episodes"].iloc[0]), []
    simpler = summary.loc[holds_up(summary, meta["min_return"]) & summary["mode"].isin(SIMPLER), "mode"]
    if len(simpler):
        found.append(f"Simpler modes kept their return on these episodes too: {', '.join(simpler)}.")
    if n < 2:
        found.append("One episode gives no interval.")
    elif n < FEW:
        found.append(f"{n} episodes are few: the intervals are too narrow. Use {FEW} or more.")
    if summary["return_mean"].iloc[0] <= 0:
        found.append(
            "The teacher's mean return is not positive, so there is no return ratio. The report compares "
            "mean returns instead."
        )
    if (summary["failure_rate"].iloc[1:] == 0).any():  # the baseline's is 0 by definition
        unseen = 1 - 0.05 ** (1 / n)
        found.append(
            f"A mode without a failure in {n} episodes may still fail in up to {_percent(unseen)} of all "
            "episodes (95 % bound)."
        )
    return found


def describe(mode: SpeculationConfig) -> str:
    """A mode in one line of plain words."""
    corrector = f"the corrector {mode.corrector}" if mode.corrector else ""
    if mode.plan_length == 0:
        words = f"Never plans: {corrector or 'the policy prior'} acts alone."
    elif mode.execution_horizon == 1:
        budget = f"iterations of the planner: {mode.iterations}" if mode.iterations else "the teacher itself"
        words = f"Plans at every step ({budget})."
    else:
        how = f"; {corrector} changes all but the first" if corrector else " as planned"
        words = f"Executes {mode.execution_horizon} steps of each plan{how}."
    if mode.refine_steps:
        words += " A short search in the world model refines the action."
    if mode.threshold:
        words += " Falls back to a new plan when the mismatch is too large."
    return words


def reasons(calibration: Path, summary: pd.DataFrame, meta: Mapping[str, Any]) -> list[dict[str, str]]:
    """Rows `mode, ratio, pushed, ms, why` of text: why each other mode was not chosen.

    Args:
        calibration: the folder with the numbers of the choice. Modes that it lacks share a row.
        summary: of the held-out episodes; names all modes.
        meta: as in `verdict`, with `min_return_pushed`.
    """
    tried = pd.read_csv(calibration / "modes" / "summary.csv")
    held = dict(zip(tried["mode"], holds_up(tried, meta["min_return"]), strict=True))
    path = calibration / "pushed" / "summary.csv"
    pushed = pd.read_csv(path) if path.exists() else tried[:0]
    tried, pushed = (table.set_index("mode", drop=False) for table in (tried, pushed))
    baseline, chosen = summary["mode"].iloc[0], meta["chosen"]
    found: list[dict[str, str]] = []
    untried: dict[str, list[str]] = {}  # by reason
    for mode in summary["mode"]:
        if mode in (baseline, chosen):
            continue
        if mode not in tried.index:
            if mode in SIMPLER:
                why = "A simpler method. It is measured for comparison and is never chosen."
            elif len(tried) == 1:
                why = "Not tried, for the reason in the verdict."
            else:
                why = "Not tried. Even without fallbacks it would be too slow to be chosen."
            untried.setdefault(why, []).append(mode)
            continue
        own, under_pushes, withstands = tried.loc[mode], "–", True
        if mode in pushed.index:
            under_pushes = _cells(pushed.loc[mode])["return_ratio"]
            lost = pushed.loc[baseline, "return_mean"] - pushed.loc[mode, "return_mean"]
            withstands = lost <= (1 - meta["min_return_pushed"]) * abs(pushed.loc[baseline, "return_mean"])
        if not held[mode]:
            why = f"Its interval allows a loss of more than {_percent(1 - meta['min_return'])} of the return."
        elif not withstands:
            why = f"It loses more than {_percent(1 - meta['min_return_pushed'])} of the return under pushes."
        elif chosen == baseline:
            why = "It keeps the return but saves too little time."
        else:
            why = f"It keeps the return too. {chosen} is faster, or as fast with a higher lower end."
        ratio, ms = _cells(own)["return_ratio"], _number(own["act_ms_mean"])
        found.append({"mode": mode, "ratio": ratio, "pushed": under_pushes, "ms": ms, "why": why})
    none = dict.fromkeys(("ratio", "pushed", "ms"), "–")
    return [*found, *({"mode": ", ".join(modes), **none, "why": why} for why, modes in untried.items())]


def _rivals(summary: pd.DataFrame, meta: Mapping[str, Any]) -> list[str]:
    """The modes in colour: the baseline, the chosen mode, and the best of the others and of SIMPLER."""
    held = holds_up(summary, meta["min_return"])
    # Modes that keep the return come first, ordered by time; then the others, ordered by return.
    ranked = summary.assign(lost=~held, rank=summary["act_ms_mean"].where(held, -summary["return_mean"]))
    ranked = ranked.iloc[1:].sort_values(["lost", "rank"], kind="stable")
    others = [mode for mode in ranked["mode"] if mode not in (*SIMPLER, meta["chosen"])]
    simpler = [mode for mode in ranked["mode"] if mode in SIMPLER]
    best = list(dict.fromkeys([summary["mode"].iloc[0], meta["chosen"], *others]))[: len(RIVALS)]
    return [*best, *simpler][: 1 + len(RIVALS)]


def _modes(
    summary: pd.DataFrame, meta: Mapping[str, Any], rivals: Sequence[str]
) -> tuple[list[Mode], dict[str, float]]:
    """All modes, `rivals` first; and the positions of the baseline and of `required` on the return axis."""
    rows = summary.set_index("mode", drop=False)
    baseline = rows.iloc[0]
    columns, one, required = (
        ["return_ratio_low", "return_ratio", "return_ratio_high"],
        1.0,
        meta["min_return"],
    )
    if np.isnan(baseline.return_ratio):
        columns, one = ["return_low", "return_mean", "return_high"], baseline.return_mean
        required = one - (1 - required) * abs(one)
    shown = [required, one, *rows.loc[rivals, columns].to_numpy().ravel()]  # everything in colour
    low, high = np.nanmin(shown), np.nanmax(shown)
    margin = 0.05 * (high - low) or 1.0

    def at(value: float) -> float:
        return float(np.clip(100 * (value - low + margin) / (high - low + 2 * margin), 0, 100))

    colors = dict(zip(rivals, (TEXT, *RIVALS), strict=False))
    modes = []
    for i, name in enumerate([*rivals, *(mode for mode in rows.index if mode not in rivals)]):
        row = rows.loc[name]
        marks = row[columns].fillna(row[columns[1]])  # without an interval, a point
        modes.append(
            Mode(
                name=name,
                tag=f"m{i}",
                color=colors.get(name, GREY),
                words=describe(SpeculationConfig(**meta["modes"][name])),
                cells=_cells(row),
                speed=_factor(baseline.act_ms_mean / row.act_ms_mean),
                bar=min(100, 100 * row.act_ms_mean / rows.loc[rivals, "act_ms_mean"].max()),
                marks=tuple(map(at, marks)),
            )
        )
    return modes, {"one": at(one), "required": at(required)}


def _when(steps: pd.DataFrame, modes: Sequence[Mode], subject: str) -> str | None:
    """Planner calls over the time of an episode; None if all modes in colour plan always or never."""
    plans = steps["kind"].isin(PLANS).groupby(steps["mode"]).mean()
    shown = [mode for mode in modes if 0 < plans[mode.name] < 1]
    if all(mode.color == GREY for mode in shown):
        return None
    n = steps["t"].max() + 1
    longest = steps["k"].max() + 1
    width = min(longest, max(1, n // 4))  # at least the longest plan: else fixed horizons show as waves

    def draw(axes: Axes) -> None:
        top = 0.0
        for mode in shown:
            own = steps[(steps["mode"] == mode.name) & (steps["t"] < n // width * width)]
            kinds = own["kind"].groupby(own["t"] // width * width + width / 2)
            calls = 100 * kinds.agg(lambda kind: kind.isin(PLANS).mean())
            axes.plot(calls, color=mode.color, gid=mode.tag, zorder=1 + (mode.color != GREY))
            top = max(top, 0 if mode.color == GREY else calls.max())
            if mode.name == subject:
                fallbacks = 100 * kinds.agg(lambda kind: (kind == "fallback").mean())
                axes.fill_between(fallbacks.index, fallbacks, color=FALLBACK, alpha=0.5, lw=0, gid=mode.tag)
        axes.set_ylim(0, 1.1 * top)
        axes.set_xlabel("time in the episode (steps)")
        axes.set_ylabel("planner calls (% of steps)")

    return _svg(draw, "planner calls over the time of an episode")


def _where(episodes: pd.DataFrame, modes: Sequence[Mode], seeds: Sequence[int]) -> str:
    """Return of every episode minus the baseline's on the same seed, in the order of `seeds`."""
    returns = episodes.pivot(index="seed", columns="mode", values="return").loc[list(seeds)]
    difference = returns.sub(returns[modes[0].name], axis="index")
    in_color = difference[[mode.name for mode in modes if mode.color != GREY]]

    def draw(axes: Axes) -> None:
        for i, mode in enumerate(modes[1:]):
            x = np.arange(len(returns)) + 0.15 * (i % 3 - 1)
            y = difference[mode.name].clip(in_color.min().min(), in_color.max().max())
            axes.scatter(x, y, 24, mode.color, gid=mode.tag, lw=0, zorder=2 + (mode.color != GREY))
        axes.axhline(0, color=TEXT, lw=1)
        axes.set_xticks(range(len(returns)), map(str, returns.index), rotation=90, fontsize=8)
        axes.grid(axis="x", visible=False)
        axes.set_xlabel("seed of the episode")
        axes.set_ylabel("return minus the baseline's")

    return _svg(draw, "difference in return to the baseline, episode by episode")


def _timeline(steps: pd.DataFrame) -> str:
    """One episode of one mode, step by step; a mode without corrections has no panel for them."""
    lines = [name for name in ("delta_a", "mismatch") if steps[name].any()] + ["reward"]
    t, kind = steps["t"].to_numpy(), steps["kind"].to_numpy()
    edges = np.append(t, t[-1] + 1)

    def draw(kinds: Axes, *panels: Axes) -> None:
        kinds.vlines(t[kind == "planned"], 0, 1, color=RIVALS[0], lw=0.5)
        kinds.vlines(t[kind == "fallback"], 0, 1.6, color=FALLBACK, lw=1)
        kinds.set_axis_off()
        for axes, name in zip(panels, lines, strict=True):
            axes.stairs(steps[name], edges, fill=True, color=GREY, lw=0.3)
            axes.set_ylabel(BY_STEP[name], rotation=0, ha="right", va="center")
            axes.yaxis.set_major_locator(MaxNLocator(2))
        panels[-1].set_xlabel("time in the episode (steps)")

    return _svg(draw, "one episode, step by step", [0.35, *[1] * len(lines)])


def _svg(draw: Callable[..., None], alt: str, panels: Sequence[float] = (1,)) -> str:
    """A page element that `draw(axes, ...)` draws on panels of these relative heights.

    It is 5 inches wide, so its text is readable on a phone. The `gid` of an artist becomes a class.
    """
    with plt.rc_context(DRAWING):
        figure, axes = plt.subplots(
            len(panels),
            sharex=True,
            squeeze=False,
            figsize=(5, 3.4),
            height_ratios=panels,
            layout="tight",
        )
        for ax in axes.flat:
            ax.grid(alpha=0.25)
            ax.set_axisbelow(True)
        draw(*axes.flat)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata=dict.fromkeys(["Creator", "Date", "Format", "Type"]))
        plt.close(figure)
    svg = text.getvalue()[text.getvalue().index("<svg") :]
    # HTML needs no XML namespaces, and the file must not contain any address.
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg)
    svg = re.sub(r'<g id="(m\d+)">', r'<g class="\1">', svg)
    for drawn, ink in INKS.items():
        svg = svg.replace(drawn, ink)
    return svg.replace("<svg", f'<svg role="img" aria-label="{alt}"', 1)


def _steps_in_plan(
    by_k: pd.DataFrame, summary: pd.DataFrame, subject: str
) -> dict[str, list[dict[str, str]]]:
    """Tables by step in plan, for the published modes of 6 steps and `subject`."""
    longest = max(PAPER_HORIZONS)
    published = [f"two_tower_{longest}", f"temporal_{longest}"]
    returns = summary.set_index("mode")["return_mean"]
    tables: dict[str, list[dict[str, str]]] = {}
    for mode in dict.fromkeys([*published, subject]):
        for row in by_k[by_k["mode"] == mode].to_dict("records"):
            cells = {name: "–" if np.isnan(row[name]) else f"{row[name]:.3f}" for name in BY_STEP}
            title = f"{mode}, mean return {returns[mode]:.1f}"
            tables.setdefault(title, []).append({"k": str(row["k"]), **cells})
    return tables


def _cells(row: pd.Series) -> dict[str, str]:
    """The cells of a table row, as text."""
    cells = {"mode": str(row["mode"])}
    for name in list(COLUMNS)[1:]:
        value = row.get(name, np.nan)
        if pd.isna(value):
            cells[name] = "–"
        elif name == "return_ratio":
            cells[name] = with_interval(value, row["return_ratio_low"], row["return_ratio_high"])
        elif name in PERCENT:
            cells[name] = _percent(value)
        elif name.startswith("return"):
            cells[name] = f"{value:.1f}" if abs(value) >= 10 else f"{value:.3f}"
        else:
            cells[name] = _number(value)
    return cells


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _factor(value: float) -> str:
    return f"{value:.1f}" if value < 10 else f"{value:.0f}"


def _number(value: float) -> str:
    """A number with three significant digits, without exponent."""
    if value == 0 or abs(value) >= 100:
        return f"{value:.0f}"
    return f"{value:.{max(0, 2 - int(np.floor(np.log10(abs(value)))))}f}"


def _provenance(meta: Mapping[str, Any]) -> dict[str, str]:
    rest = [k for k in meta if k not in PROVENANCE and k not in ("task", "validation", "modes")]
    names = [*(k for k in PROVENANCE if k in meta), *rest]
    return {PROVENANCE.get(k, k.replace("_", " ")): _words(meta[k]) for k in names}


def _words(value: Any) -> str:
    """A value of `meta` as text, e.g. `a = 1, b = 2` for a dict."""
    if isinstance(value, Mapping):
        inside = (f"({_words(v)})" if isinstance(v, Mapping) else _words(v) for v in value.values())
        return ", ".join(f"{k} = {v}" for k, v in zip(value, inside, strict=True))
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(map(_words, value))
    return f"{value:.6g}" if isinstance(value, float) else str(value)
