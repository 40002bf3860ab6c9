"""The report: one HTML file with everything inside, and the same table for the terminal."""

import io
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from jinja2 import Environment, PackageLoader, select_autoescape
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator
from matplotlib.transforms import ScaledTranslation
from rich import box
from rich.table import Table
from rich.text import Text

from ..corrector import ARCHITECTURES
from ..files import atomic_write
from .metrics import by_step_in_plan, holds_up, with_interval
from .modes import HORIZONS, PAPER_HORIZONS, REFINED, SIMPLER, Family, families

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
PROVENANCE = {  # what leads, and its name in the report; the rest of `meta` follows under its own
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
FEW = 10  # episodes, below which the intervals are said to be too narrow
# Okabe and Ito's colours, which colour-blind readers can tell apart, without the yellow that paper swallows.
COLOURS = ["#0072b2", "#d55e00", "#009e73", "#e69f00", "#cc79a7", "#56b4e9", "#7f7f7f"]
MARKERS = "osD^vPX"


# The modes that are shown step by step: naive and corrected execution at the longest published horizon.
_LONGEST_OF_THE_PAPER = (
    f"naive_{max(PAPER_HORIZONS)}",
    *(
        Family(corrector, refined).mode_name(max(PAPER_HORIZONS))
        for corrector in ("two_tower", "temporal")
        for refined in (False, True)
    ),
)


class Style(NamedTuple):
    """How one mode looks in every figure."""

    color: str
    marker: str
    line: str
    fill: str  # of the marker


def write_report(
    folder: Path,
    episodes: pd.DataFrame,
    steps: pd.DataFrame,
    summary: pd.DataFrame,
    meta: Mapping[str, Any],
) -> Path:
    """Write `folder/report.html`, which needs nothing but itself.

    Args:
        folder: where to.
        episodes: as `metrics.summarise` takes them, and so are `steps`.
        steps: one row a step.
        summary: what `metrics.summarise` returned.
        meta: where the numbers come from: strings, numbers, lists and dicts, by name, all of it shown.
            `task` is the title; `chosen` the mode chosen on other seeds; `min_return` the ratio that a
            mode must hold; `why` the mode was chosen, in words; `validation` a list of dicts
            `corrector, error, plan_error, prior_error`.

    Returns:
        The file.
    """
    style = styles(list(summary["mode"]))
    by_k = by_step_in_plan(steps)
    shown = by_k[by_k["mode"].isin([*_LONGEST_OF_THE_PAPER, _choice(summary, meta)])]
    front = (
        "Bars are 95 % paired bootstrap intervals, lines join the execution horizons of one corrector. "
        "Modes that are nearly at one place stand side by side."
    )
    bars = (
        "Lines join means, bars span the quartiles; shown are the modes of the longest published horizon and "
        "the chosen one."
    )
    with plt.rc_context({"svg.hashsalt": "report", "font.size": 10}):
        figures = {
            "Return by mode: every episode (dots), their mean and its 95 % bootstrap interval (diamond "
            "and bar).": _returns(episodes, summary, style),
            f"What speculation saves and what it costs: up and to the left is better. {front}": (
                _front(summary, style, meta.get("min_return"), "planner_calls", "planner calls (% of steps)")
            ),
            f"The same against the mean time of an action. {front}": (
                _front(summary, style, meta.get("min_return"), "act_ms_mean", "mean time of an action (ms)")
            ),
            f"Mismatch by step in plan. {bars} A mismatch that led to a fallback counts where it was seen.": (
                _by_k(shown, "mismatch", "mismatch (distance of latents)", style)
            ),
            f"Size of the correction by step in plan, of modes that correct. {bars}": (
                _by_k(_that_correct(shown), "delta_a", "correction ‖δa‖ (action units)", style)
            ),
            "Distance of the executed action to the mean of the plan that the teacher makes in the same "
            f"state. {bars} Dotted: modes that have no later steps.": (
                _by_k(shown, "teacher_distance", "distance to the teacher's\naction (action units)", style)
            ),
            "Mean reward by step in plan; fallbacks count at k = 0. Dotted: modes without later steps.": (
                _by_k(shown, "reward", "reward of a step", style, quartiles=False)
            ),
            "Time of one act call at batch 1, the figures of the table. Modes that speculate are fast in "
            "most steps and as slow as the planner in the others.": _latency(summary, style),
        }
    html = (
        Environment(loader=PackageLoader("tdmpc2", "evaluation"), autoescape=select_autoescape(default=True))
        .get_template("report.html.j2")
        .render(
            task=meta.get("task", ""),
            chosen=_choice(summary, meta),
            seeds=_words(meta.get("seeds", sorted(set(episodes["seed"])))),
            headline=headline(summary, meta),
            notes=notes(summary, steps, meta.get("min_return")),
            episodes=int(summary["episodes"].iloc[0]),
            columns=COLUMNS,
            rows=[_row(row) for _, row in summary.iterrows()],
            validation=meta.get("validation"),
            paper=_paper_table(by_k, summary),
            figures=[{"svg": svg, "caption": caption} for caption, svg in figures.items()],
            provenance=_provenance(meta),
        )
    )
    path = Path(folder) / "report.html"
    with atomic_write(path) as tmp:
        tmp.write_text(html, encoding="utf-8")
    return path


def in_terminal(summary: pd.DataFrame) -> Table:
    """The summary for a terminal, within 100 columns; names of more than 14 letters are folded."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    longest = max(len(str(mode)) for mode in summary["mode"])
    for name, title in IN_TERMINAL.items():
        if name == "mode":
            table.add_column(title, min_width=min(longest, 14), overflow="fold")
        else:
            table.add_column(Text(title), justify="right", no_wrap=True)
    for _, row in summary.iterrows():
        cells = _row(row)
        table.add_row(*(Text(cells[name]) for name in IN_TERMINAL))  # Text: a bracket is no markup
    return table


def headline(summary: pd.DataFrame, meta: Mapping[str, Any]) -> str:
    """What the numbers say of the chosen mode, in words.

    The mode is `meta["chosen"]`, which was chosen on other seeds; without it, the one with the fewest
    planner calls whose lower bound meets `meta["min_return"]` on these very episodes.
    """
    rows, required = summary.set_index("mode"), meta.get("min_return")
    baseline, mode = rows.iloc[0], _choice(summary, meta)
    held_out = meta.get("chosen") == mode
    among = "on the calibration seeds" if held_out else "on these episodes"
    if mode == baseline.name:
        why = meta.get("why", f"no mode that speculates holds its return {among}, by the 95 % interval")
        return f"The agent replans at every step: {why}."
    if mode is None:
        return (
            f"{len(rows)} modes on the same {baseline.episodes:.0f} episodes. {baseline.name}, to which all "
            f"are compared, has a mean return of {baseline.return_mean:.1f}{_interval(baseline)}."
        )
    row = rows.loc[mode]
    good = required is not None and holds_up(summary, required).to_numpy()[rows.index.get_loc(mode)]
    met = "meets" if good else "does not meet"
    if held_out:
        text = f"{mode} was chosen {among}" + (f": {meta['why']}" if "why" in meta else "")
        text += ". On held-out seeds "
    else:
        text = (
            f"{mode} has the fewest planner calls of those whose return holds up {among}, which flatters it: "
            "choose on other seeds. Here "
        )
    if np.isnan(row.return_ratio):
        text += f"its mean return is {row.return_mean:.1f}, {baseline.name}'s {baseline.return_mean:.1f}"
        if required is not None and not np.isnan(row.return_difference_low):
            least = -(1 - required) * abs(baseline.return_mean)
            text += (
                f" (the lower end of the 95 % interval of the difference, {row.return_difference_low:z.1f}, "
                f"{met} the required {least:z.1f})"
            )
        text += "; "
    else:
        text += f"it keeps {row.return_ratio:.1%} of the baseline's return"
        if not np.isnan(row.return_ratio_low):
            text += f" (95 % interval {row.return_ratio_low:.1%} to {row.return_ratio_high:.1%}"
            if required is not None:
                text += f": its lower end {met} the required {required:.1%}"
            text += ")"
        text += "; "
    text += f"the planner is called in {row.planner_calls:.1%} of the steps."
    if "act_ms_median" in rows:
        text += (
            f" One act call takes {_number(row.act_ms_median)} ms at the median instead of "
            f"{_number(baseline.act_ms_median)} ms, and {_number(row.act_ms_mean)} ms on average instead of "
            f"{_number(baseline.act_ms_mean)} ms."
        )
    return text


def notes(summary: pd.DataFrame, steps: pd.DataFrame, min_return: float | None = None) -> list[str]:
    """What a careful reader has to know of these numbers in particular."""
    n, found = int(summary["episodes"].iloc[0]), []
    if min_return is not None:
        simpler = summary[holds_up(summary, min_return) & summary["mode"].isin(SIMPLER)]["mode"]
        found.append(
            f"Of what is simpler than correcting plans, this held its return on these episodes as well: "
            f"{', '.join(simpler) or 'nothing'}."
        )
    if n < 2:
        found.append("With one episode there are no intervals.")
    elif n < FEW:
        found.append(f"With {n} episodes the intervals are too narrow; {FEW} or more are needed.")
    if summary["return_mean"].iloc[0] <= 0:
        found.append(
            "The baseline's mean return is not positive, so that a ratio to it says nothing: what holds up "
            "is told by the paired difference."
        )
    if (summary["failure_rate"].iloc[1:] == 0).any():  # the baseline's is 0 by definition
        unseen = 1 - 0.05 ** (1 / n)
        found.append(
            f"No failure among {n} episodes is what a mode that fails in up to {_percent(unseen)} of them "
            "may show too (95 % bound); the intervals know nothing of failures that did not occur."
        )
    measured = steps.loc[steps["teacher_distance"].notna(), "seed"].nunique()
    if not measured:
        found.append("The distance to the teacher's action was not measured.")
    elif measured < n:
        found.append(f"The distance to the teacher's action was measured on {measured} of {n} episodes.")
    return found


def styles(modes: Sequence[str]) -> dict[str, Style]:
    """Colour, marker and line of every mode: the baseline is black, beyond seven others turn hollow."""
    table = {modes[0]: Style("#000000", "*", "-", "full")}
    for i, mode in enumerate(modes[1:]):
        again, j = i // len(COLOURS), i % len(COLOURS)
        marker = MARKERS[(j + again) % len(MARKERS)]
        table[mode] = Style(COLOURS[j], marker, "--" if again else "-", "none" if again else "full")
    return table


def _choice(summary: pd.DataFrame, meta: Mapping[str, Any]) -> str | None:
    """The mode that the report is about; None where nothing says which."""
    modes, required = list(summary["mode"]), meta.get("min_return")
    if meta.get("chosen") in modes:
        return str(meta["chosen"])
    if required is None:
        return None
    good = summary[holds_up(summary, required)]
    return str(good.sort_values("planner_calls", kind="stable")["mode"].iloc[0])


def _row(row: pd.Series) -> dict[str, str]:
    """The cells of a table's row, as text."""
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


def _interval(row: pd.Series) -> str:
    if np.isnan(row.return_low):
        return ""
    return f" (95 % interval {row.return_low:.1f} to {row.return_high:.1f})"


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _number(value: float) -> str:
    """Three digits that count, without exponents."""
    if value == 0 or abs(value) >= 100:
        return f"{value:.0f}"
    return f"{value:.{max(0, 2 - int(np.floor(np.log10(abs(value)))))}f}"


def _provenance(meta: Mapping[str, Any]) -> dict[str, str]:
    rest = [k for k in meta if k not in PROVENANCE and k not in ("task", "validation")]
    names = [*(k for k in PROVENANCE if k in meta), *rest]
    return {PROVENANCE.get(k, k.replace("_", " ")): _words(meta[k]) for k in names}


def _words(value: Any) -> str:
    """A value of `meta` as a reader would write it: `a = 1, b = 2` for a dict, `3 to 9` for a range."""
    if isinstance(value, Mapping):
        inside = (f"({_words(v)})" if isinstance(v, Mapping) else _words(v) for v in value.values())
        return ", ".join(f"{k} = {v}" for k, v in zip(value, inside, strict=True))
    if isinstance(value, Sequence) and not isinstance(value, str):
        whole = len(value) > 2 and all(isinstance(v, int | np.integer) for v in value)
        if whole and list(value) == list(range(value[0], value[0] + len(value))):
            return f"{value[0]} to {value[-1]}"
        return ", ".join(map(_words, value))
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _svg(draw: Callable[[Axes], None], alt: str, height: float = 4.2) -> str:
    """What `draw` draws, as an element that HTML takes as it is."""
    figure, axes = plt.subplots(figsize=(9.5, height), layout="constrained")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)
    draw(axes)
    text = io.StringIO()
    nothing = dict.fromkeys(["Creator", "Date", "Format", "Type"])
    figure.savefig(text, format="svg", metadata=nothing, dpi=200)
    plt.close(figure)
    svg = text.getvalue()[text.getvalue().index("<svg") :]
    # In HTML the names of XML's namespaces are known, and the file shall hold no address at all.
    for name in ('xmlns="http://www.w3.org/2000/svg"', 'xmlns:xlink="http://www.w3.org/1999/xlink"'):
        svg = svg.replace(name, "")
    return svg.replace("<svg", f'<svg role="img" aria-label="{escape(alt)}"', 1)


def _modes_as_rows(axes: Axes, modes: Sequence[str]) -> None:
    axes.set_yticks(range(len(modes)), [_plain(mode) for mode in modes])
    axes.set_ylim(len(modes) - 0.5, -0.5)


def _plain(text: str) -> str:
    """Text that matplotlib does not take for mathematics."""
    return text.replace("$", r"\$")


def _legend(axes: Axes, style: Mapping[str, Style], modes: Sequence[str]) -> None:
    handles = [
        Line2D([], [], color=s.color, marker=s.marker, ls=s.line, fillstyle=s.fill, label=_plain(mode))  # type: ignore[arg-type]
        for mode, s in style.items()
        if mode in modes
    ]
    axes.legend(handles=handles, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)


def _returns(episodes: pd.DataFrame, summary: pd.DataFrame, style: Mapping[str, Style]) -> str:
    def draw(axes: Axes) -> None:
        rng = np.random.default_rng(0)
        for y, row in enumerate(summary.itertuples()):
            returns = episodes.loc[episodes["mode"] == row.mode, "return"].to_numpy()
            color = style[str(row.mode)].color
            jitter = y + rng.uniform(-0.28, 0.28, len(returns))
            axes.scatter(returns, jitter, s=15, alpha=0.5, color=color, linewidths=0)
            axes.plot(row.return_mean, y, "D", color=color, mec="white", ms=9)
            ends = [row.return_low, row.return_high]
            axes.plot(ends, [y, y], "|-", color="black", lw=1.5, ms=9, mew=1.5)
        _modes_as_rows(axes, list(summary["mode"]))
        axes.set_xlabel("return of an episode (sum of rewards)")

    return _svg(draw, "return by mode", 1.2 + 0.4 * len(summary))


def _front(
    summary: pd.DataFrame, style: Mapping[str, Style], required: float | None, column: str, label: str
) -> str:
    scale = 100 if column == "planner_calls" else 1
    at = (scale * summary.set_index("mode")[column]).to_dict()
    widest = max(at.values())

    def draw(axes: Axes) -> None:
        known = summary[np.isfinite(summary["return_ratio"])]
        if known.empty:
            _empty(axes, "no ratio: the baseline's mean return is not positive")
        for family in families(list(ARCHITECTURES)):
            own = known[known["mode"].isin([family.mode_name(k) for k in HORIZONS])]
            axes.plot([at[mode] for mode in own["mode"]], own["return_ratio"], color="0.75", lw=1, zorder=0)
        placed: list[float] = []
        for row in known.itertuples():
            x, y, s = at[str(row.mode)], row.return_ratio, style[str(row.mode)]
            # The low and high end may be NaN, and the mean outside of them by rounding.
            below, above = np.fmax(y - row.return_ratio_low, 0), np.fmax(row.return_ratio_high - y, 0)
            near = sum(abs(x - other) < 0.015 * widest for other in placed)
            placed.append(x)
            # 0, 1, -1, 2, -2, ... times nine points of the page to the right
            shift = (near + 1) // 2 * (9 if near % 2 else -9) / 72
            beside = ScaledTranslation(shift, 0, axes.figure.dpi_scale_trans)  # type: ignore[union-attr]
            look = dict(fmt=s.marker, color=s.color, fillstyle=s.fill, ms=8, capsize=3)
            axes.errorbar(x, y, [[below], [above]], transform=axes.transData + beside, **look)  # type: ignore[arg-type]
            axes.update_datalim([(x, y - below), (x, y + above)])  # which a shifted point does not
        axes.autoscale_view()
        axes.axhline(1.0, color="black", lw=0.8)
        if required is not None and not known.empty:
            axes.axhline(required, color="black", lw=0.8, ls=":")
            axes.annotate(
                f"required: {required:g}",
                (1, required),
                (-3, -3),
                xycoords=axes.get_yaxis_transform(),
                textcoords="offset points",
                ha="right",
                va="top",
                fontsize=8,
            )
        axes.set_xlim(-0.04 * widest, 1.04 * widest)
        axes.set_xlabel(label)
        axes.set_ylabel("mean return\n(ratio to the baseline's)")
        _legend(axes, style, list(known["mode"]))

    return _svg(draw, f"return ratio against {label}", max(4.2, 0.8 + 0.25 * len(summary)))


def _paper_table(by_k: pd.DataFrame, summary: pd.DataFrame) -> list[dict[str, str]]:
    """Rows of the table of the published modes of the longest horizon by step in plan, as text."""
    names = [n for n in _LONGEST_OF_THE_PAPER[1:] if not n.endswith(REFINED)]
    returns = summary.set_index("mode")["return_mean"]
    rows = []
    for row in by_k[by_k["mode"].isin(names)].to_dict("records"):
        rows.append(
            {
                "mode": f"{row['mode']} (mean return {returns[row['mode']]:.1f})",
                "step": f"t+{row['k'] + 1}",
                **{
                    name: "–" if np.isnan(row[name]) else f"{row[name]:.3f}"
                    for name in ("mismatch", "delta_a", "reward", "teacher_distance")
                },
            }
        )
    return rows


def _that_correct(by_k: pd.DataFrame) -> pd.DataFrame:
    largest = by_k.groupby("mode")["delta_a"].transform("max")
    return by_k[(largest > 0) & (by_k["k"] > 0)]


def _by_k(
    table: pd.DataFrame, name: str, label: str, style: Mapping[str, Style], *, quartiles: bool = True
) -> str:
    known = table[table[f"{name}_n"] > 0]
    modes = list(dict.fromkeys(known["mode"]))

    def draw(axes: Axes) -> None:
        if not modes:
            _empty(axes, "not measured")
        for i, mode in enumerate(modes):
            own, s = known[known["mode"] == mode], style[mode]
            x = own["k"].to_numpy() + 0.5 * (i / max(len(modes) - 1, 1) - 0.5)
            mean = own[name].to_numpy()
            axes.plot(
                x, mean, marker=s.marker, ls=s.line, color=s.color, fillstyle=s.fill, ms=5, lw=1.3  # type: ignore[arg-type]
            )  # fmt: skip
            if quartiles:
                axes.vlines(x, own[f"{name}_q25"], own[f"{name}_q75"], color=s.color, lw=3, alpha=0.25)
            if len(own) == 1:
                axes.axhline(mean[0], color=s.color, lw=1, ls=":")
        axes.set_xlabel("step in plan k (0: the step planned from)")
        axes.set_ylabel(label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        _legend(axes, style, modes)

    return _svg(draw, f"{name} by step in plan", max(4.2, 0.8 + 0.25 * len(modes)))


def _latency(summary: pd.DataFrame, style: Mapping[str, Style]) -> str:
    modes = list(summary["mode"])
    marks = {"median": ("|", 16.0), "mean": ("D", 6.0), "p95": ("^", 6.0), "p99": ("v", 6.0)}

    def draw(axes: Axes) -> None:
        for y, row in summary.iterrows():
            times = [row[f"act_ms_{name}"] for name in marks]
            color = style[str(row["mode"])].color
            axes.plot([min(times), max(times)], [y, y], color=color, lw=2, alpha=0.5)  # type: ignore[list-item]
            for value, (marker, size) in zip(times, marks.values(), strict=True):
                axes.plot(value, y, marker, color=color, mfc="white", mew=1.6, ms=size)
        _modes_as_rows(axes, modes)
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        low, high = axes.get_xlim()
        if high < 10 * low:  # less than a decade: the axis would show one label, or none
            axes.set_xlim(low / 2, high * 2)
            axes.xaxis.set_minor_formatter(
                FuncFormatter(lambda x, _: f"{x:g}" if f"{x:e}"[0] in "25" else "")
            )
        axes.set_xlabel("time of one act call (ms, log scale)")
        handles = [
            Line2D([], [], color="black", marker=m, ls="", mfc="white", mew=1.6, ms=min(size, 9), label=name)
            for name, (m, size) in marks.items()
        ]
        axes.legend(handles=handles, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=4, frameon=False)

    return _svg(draw, "latency by mode", 1.5 + 0.4 * len(modes))


def _empty(axes: Axes, why: str) -> None:
    axes.text(0.5, 0.5, why, transform=axes.transAxes, ha="center")
