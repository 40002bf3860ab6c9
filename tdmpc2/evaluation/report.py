"""The report: one HTML file with everything inside, and the same table for the terminal."""

import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from jinja2 import Environment, PackageLoader, select_autoescape
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from rich.console import Console
from rich.table import Table

from ..files import atomic_write
from .metrics import by_step_in_plan, paired_ratio

# Okabe and Ito's palette, which colour-blind readers can tell apart, and then greys.
PALETTE = ["#000000", "#999999", "#bbbbbb", "#0072b2", "#56b4e9", "#d55e00", "#e69f00", "#cc79a7"]
MARKERS = "osDv^<>Pph*X"
MORE = ["#009e73", "#f0e442", "#666666", "#8c564b"]
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
    "act_ms_median": "act, median ms",
    "act_ms_p95": "p95",
    "act_ms_p99": "p99",
    "act_ms_mean": "mean",
}


def write_report(
    folder: Path,
    episodes: pd.DataFrame,
    steps: pd.DataFrame,
    latency: pd.DataFrame,
    summary: pd.DataFrame,
    meta: Mapping[str, Any],
) -> Path:
    """Write `folder/report.html`, which needs nothing but itself.

    Args:
        folder: where to.
        episodes: as `metrics.summarise` takes them, and so are `steps` and `latency`.
        steps: one row a step.
        latency: one row a timed call.
        summary: what `metrics.summarise` returned.
        meta: `task`, `seeds`, `chosen`, `validation`, and anything else that says where the numbers
            come from; strings, numbers, lists and dicts.

    Returns:
        The file.
    """
    colours = dict(zip(summary["mode"], _cycle(len(summary)), strict=True))
    by_k = by_step_in_plan(steps)
    figures = [
        (
            _returns(episodes, summary, colours),
            "Return by mode: every episode, mean, and 95 % bootstrap interval of the mean.",
        ),
        (
            _front(summary, colours),
            "What speculation saves and what it costs: up and to the left is better.",
        ),
        (
            _by_k(by_k, "mismatch", "mismatch ‖z − ẑ‖", colours),
            "Mismatch by step in plan: mean and quartiles; fallbacks count where they were decided.",
        ),
        (
            _by_k(by_k, "delta_a", "correction ‖δa‖", colours),
            "Size of the correction by step in plan: mean and quartiles.",
        ),
        (
            _by_k(by_k, "teacher_distance", "distance to the teacher's action", colours),
            "Distance of the executed action to the mean of the plan that the teacher makes there.",
        ),
        (
            _by_k(by_k, "reward", "reward per step", colours),
            "Reward by step in plan: mean and quartiles.",
        ),
        (
            _latency(latency, colours),
            "Time of one act call at batch 1: the share of calls that took at most so long.",
        ),
    ]
    template = Environment(
        loader=PackageLoader("tdmpc2", "evaluation"), autoescape=select_autoescape(default=True)
    ).get_template("report.html.j2")
    html = template.render(
        meta=meta,
        headline=headline(summary, meta),
        episodes=int(summary["episodes"].iloc[0]),
        columns=COLUMNS,
        rows=[_row(row) for _, row in summary.iterrows()],
        figures=[{"svg": svg, "caption": caption} for svg, caption in figures],
        provenance={k: v for k, v in meta.items() if k not in ("validation", "task")},
    )
    path = Path(folder) / "report.html"
    with atomic_write(path) as tmp:
        tmp.write_text(html, encoding="utf-8")
    return path


def print_table(summary: pd.DataFrame, console: Console) -> None:
    """The summary in the terminal."""
    shown = ["mode", "return_mean", "return_worst5", "return_ratio", "planner_calls", "fallbacks"]
    shown += ["delta_a", "act_ms_median", "act_ms_p99"]
    table = Table()
    for name in shown:
        table.add_column(COLUMNS[name], justify="left" if name == "mode" else "right", no_wrap=name == "mode")
    for _, row in summary.iterrows():
        cells = _row(row)
        table.add_row(*(cells[name] for name in shown))
    console.print(table)


def headline(summary: pd.DataFrame, meta: Mapping[str, Any]) -> str:
    """What the numbers say of the chosen mode, in words."""
    rows = summary.set_index("mode")
    chosen = meta.get("chosen")
    if chosen is None or chosen not in rows.index:
        return f"{len(summary)} modes of execution, the first of them the baseline."
    if chosen == summary["mode"].iloc[0]:
        return (
            "No setting held the required return on the calibration seeds: "
            "the agent replans at every step."
        )
    row = rows.loc[chosen]
    kept = "an unknown share (the baseline's return is not positive)"
    if np.isfinite(row.return_ratio):
        kept = f"{row.return_ratio:.1%}"
    if np.isfinite(row.return_ratio_low):
        kept += f" (95 % interval {row.return_ratio_low:.1%} to {row.return_ratio_high:.1%})"
    return (
        f"Chosen on the calibration seeds: {chosen}. On held-out seeds it keeps {kept} of the baseline's return "
        f"with planner calls in {row.planner_calls:.1%} of the steps; a median step takes "
        f"{row.act_ms_median:.2f} ms instead of {rows.iloc[0].act_ms_median:.2f} ms, a mean step "
        f"{row.act_ms_mean:.2f} ms instead of {rows.iloc[0].act_ms_mean:.2f} ms."
    )


def _row(row: pd.Series) -> dict[str, str]:
    percent = {"failure_rate", "termination_rate", "planner_calls", "fallbacks"}
    cells = {"mode": str(row["mode"])}
    for name in COLUMNS:
        if name == "mode":
            continue
        value = row.get(name, np.nan)
        if pd.isna(value):
            cells[name] = "–"
        elif name == "return_ratio":
            low, high = row["return_ratio_low"], row["return_ratio_high"]
            interval = "" if pd.isna(low) else f" [{low:.3f}, {high:.3f}]"
            cells[name] = f"{value:.3f}{interval}"
        elif name in percent:
            cells[name] = f"{100 * value:.1f} %"
        elif name.startswith("return"):
            cells[name] = f"{value:.1f}"
        else:
            cells[name] = f"{value:.3f}" if value < 1 else f"{value:.2f}"
    return cells


def _cycle(n: int) -> list[str]:
    colours = PALETTE + MORE
    return [colours[i % len(colours)] for i in range(n)]


def _svg(draw: Callable[[Axes], None], height: float = 4.2) -> str:
    figure, axes = plt.subplots(figsize=(9.5, height), layout="constrained")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    draw(axes)
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    plt.close(figure)
    return text.getvalue()[text.getvalue().index("<svg") :]


def _returns(episodes: pd.DataFrame, summary: pd.DataFrame, colours: Mapping[str, str]) -> str:
    def draw(axes: Axes) -> None:
        rng = np.random.default_rng(0)
        for y, mode in enumerate(summary["mode"]):
            returns = episodes.loc[episodes["mode"] == mode, "return"].to_numpy()
            jitter = y + rng.uniform(-0.2, 0.2, len(returns))
            axes.scatter(returns, jitter, s=14, alpha=0.45, color=colours[mode], linewidths=0)
            mean, low, high = paired_ratio(returns, np.ones_like(returns))
            if np.isfinite(low):
                axes.plot([low, high], [y, y], color=colours[mode], lw=2.5)
            axes.plot(mean, y, "D", color=colours[mode], mec="white", ms=8)
        axes.set_yticks(range(len(summary)), list(summary["mode"]))
        axes.invert_yaxis()
        axes.set_xlabel("return of an episode")

    return _svg(draw, 1.4 + 0.42 * len(summary))


def _front(summary: pd.DataFrame, colours: Mapping[str, str]) -> str:
    def draw(axes: Axes) -> None:
        for i, row in enumerate(summary.itertuples()):
            if not np.isfinite(row.return_ratio):
                continue
            x, style = 100 * row.planner_calls, dict(color=colours[row.mode], label=row.mode)
            axes.plot(x, row.return_ratio, MARKERS[i % len(MARKERS)], ms=8, **style)
            if np.isfinite(row.return_ratio_low):
                axes.plot([x, x], [row.return_ratio_low, row.return_ratio_high], color=colours[row.mode])
        axes.axhline(1.0, color="black", lw=0.8, ls=":")
        axes.set_xlabel("planner calls, % of steps")
        axes.set_ylabel("return, ratio to the baseline's")
        _legend(axes)

    return _svg(draw)


def _by_k(table: pd.DataFrame, name: str, label: str, colours: Mapping[str, str]) -> str:
    def draw(axes: Axes) -> None:
        modes = list(dict.fromkeys(table["mode"]))
        for i, mode in enumerate(modes):
            own = table[(table["mode"] == mode) & (table[f"{name}_n"] > 0)]
            if own.empty:
                continue
            x = own["k"].to_numpy() + 0.4 * (i / max(len(modes) - 1, 1) - 0.5)
            below = np.maximum(own[name] - own[f"{name}_q25"], 0)
            above = np.maximum(own[f"{name}_q75"] - own[name], 0)
            marker = MARKERS[i % len(MARKERS)]
            axes.errorbar(
                x, own[name], [below, above], fmt=f"{marker}-", ms=5, lw=1, color=colours[mode], label=mode
            )
        axes.set_xlabel("step in plan k (0: planned from)")
        axes.set_ylabel(label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        _legend(axes)

    return _svg(draw)


def _latency(latency: pd.DataFrame, colours: Mapping[str, str]) -> str:
    def draw(axes: Axes) -> None:
        for mode, own in latency.groupby("mode", sort=False):
            times = np.sort(own["act_ms"].to_numpy())
            share = np.arange(1, len(times) + 1) / len(times)
            axes.step(times, 100 * share, color=colours[str(mode)], label=mode, where="post")
        axes.set_xscale("log")
        axes.set_xlabel("time of one act call, ms (log scale)")
        axes.set_ylabel("calls, %")
        _legend(axes)

    return _svg(draw)


def _legend(axes: Axes) -> None:
    """A legend beside the axes, or a word where nothing could be drawn."""
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    else:
        axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center")
