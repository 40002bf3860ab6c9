"""Write the numbers in README and docs, their figure and `results/speculation.csv` from the raw results.

    python research/write_results.py

Each folder `results/TASK` holds what `tdmpc2 accelerate` left in its `evaluation/` folder, but for the
large table of single steps; in `perturbed/` it holds what `tdmpc2 perturb` wrote.
`results/experiments`, `paper`, `rules`, `bench.json`, `precision`, `delay`, `soak.json`, `soak-thread.json`
and `step.json` are of the program of that name in `research/`, `results/export.json` of
`research/export_latency.py`, `results/realtime` of `tdmpc2 evaluate realtime=true`, and
`evaluation.json` in `pretrained/TASK/evaluation` of `tdmpc2 evaluate`.

A page takes a block of numbers by its marks, and any page can take any block:

    <!-- headline -->
    <!-- /headline -->

Everything between two marks is written by this script.
"""

import ast
import re
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import isnan
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from tdmpc2.cli import run
from tdmpc2.config import PlannerConfig
from tdmpc2.corrector import ARCHITECTURES
from tdmpc2.errors import DataError
from tdmpc2.evaluation import realtime
from tdmpc2.evaluation.aggregate import (
    ALL,
    CHOSEN,
    TaskResults,
    mean_ratio,
    modes_of,
    paired_returns,
    speculation_table,
    stratified_interval,
)
from tdmpc2.evaluation.config import EvaluationConfig
from tdmpc2.evaluation.metrics import PLANS, paired_ratio, with_interval
from tdmpc2.evaluation.modes import BASELINE, DISTILLED, HORIZONS, REFINED, SIMPLER, Family
from tdmpc2.files import atomic_write, flat, read_json
from tdmpc2.training.trainer import TrainConfig

plt.rcParams["svg.hashsalt"] = "tdmpc2"  # one name for each part of a figure, in every run
ROOT = Path(__file__).parents[1]
MIN_RETURN, MIN_RETURN_PERTURBED = EvaluationConfig.min_return, EvaluationConfig.min_return_pushed
UNPERTURBED = "none"
HARDEST = {"push": 1.0, "obs_noise": 0.1, "mass": 1.6, "friction": 0.4}  # strength of each kind
COLUMNS = ["mode", "return", "ratio to replanning [95 %]", "planner calls", "act, median", "act, mean"]


BUDGET = "budget"  # the experiment whose reference is of another one
FULL_BUDGET = ("executed", "the mean, 1 step")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is read and written."""

    results: str = str(ROOT / "results")  # folder of a folder per task
    pretrained: str = str(ROOT / "pretrained")  # folder of a folder per teacher
    readme: str = str(ROOT / "README.md")
    docs: str = str(ROOT / "docs")  # folder of the other pages and of the figure


def main(settings: Settings) -> None:
    results, docs = Path(settings.results), Path(settings.docs)
    tasks = sorted(p.parent for p in results.glob("*/summary.csv"))
    if not tasks:
        raise DataError(f"no results in {settings.results}: run `tdmpc2 accelerate` first")
    found = {folder.name: read(folder) for folder in tasks}
    table = speculation_table(found)
    with atomic_write(results / "speculation.csv") as tmp:
        table.to_csv(tmp, index=False)
    perturbations = perturbed_tables(tasks)
    measured = [Experiments(path) for path in sorted((results / "experiments").glob("*.csv"))]
    published = sorted(p.parent for p in results.glob("paper/*/summary.csv"))
    compared_rules = sorted(results.glob("rules/*.csv"))
    blocks = {
        "headline": headline(table, found) + in_time(results / "soak.json"),
        "tasks": overview(table, found),
        "rivals": rivals(table),
        "modes": pooled_rows(found, table),
        "commits": commits(tasks),
        "by_task": "".join(section(folder, found[folder.name]) for folder in tasks),
        "correctors": correctors(found, table),
        "perturbed": perturbed(perturbations),
        "when_not": when_not(table, found, perturbations),
        "agents": shipped_agents(Path(settings.pretrained)),
        "teachers": teachers(Path(settings.pretrained)),
        "speed": speed(results),
        "export": exported(results / "export.json"),
        "experiments": (all_experiments(measured) if len(measured) > 1 else "")
        + "".join(map(experiments, measured)),
        "published_modes": "".join(map(published_modes, published)),
        "rules": "".join(map(rules, compared_rules)),
        "rooms": rooms(ROOT / "tdmpc2"),
        "step": steps_without_plan(results / "step.json"),
        "refining": "".join(map(searches, sorted(results.glob("refining/*.csv")))),
        "delay": "".join(late_plans(path, table) for path in sorted(results.glob("delay/*.csv"))),
        "soak": "".join(map(soak, sorted(results.glob("soak*.json"), key=lambda path: path.stem)))
        or "`research/soak.py` has no results here yet.\n",
        "realtime": real_time(sorted(p.parent for p in results.glob("realtime/*/realtime.csv"))),
    }
    pages = [Path(settings.readme), *sorted(docs.glob("*.md"))]
    for page in pages:
        with atomic_write(page) as tmp:
            tmp.write_text(filled(page.read_text(), blocks, page))
    draw(found, docs / "front.svg")
    clocks = sorted(results.glob("realtime/*/realtime.csv"))
    if clocks:
        draw_real_time(clocks, docs / "realtime.svg")
    print(f"{len(tasks)} tasks written to {len(pages)} pages", file=sys.stderr)


def read(folder: Path) -> TaskResults:
    names = "summary", "episodes", "latency"
    summary, episodes, latency = (pd.read_csv(folder / f"{name}.csv") for name in names)
    return TaskResults(summary, episodes, latency, read_json(folder / "chosen.json")["mode"])


def filled(content: str, blocks: Mapping[str, str], page: Path) -> str:
    """`content` of a page with each block between the marks of its name.

    Raises:
        DataError: there is no block of a mark's name, or a mark stands alone.
    """
    names = Counter(re.findall(r"<!-- /?(\w+) -->", content))
    pairs = re.compile(r"(<!-- (\w+) -->\n).*?(<!-- /\2 -->)", re.DOTALL)
    both = Counter(m[2] for m in pairs.finditer(content) for _ in range(2))
    if wrong := (names - both).keys() | (names.keys() - blocks.keys()):
        raise DataError(f"{page}: the marks {', '.join(sorted(wrong))} stand alone or name no block")
    return pairs.sub(lambda m: m[1] + blocks[m[2]] + m[3], content)


def rooms(package: Path) -> str:
    """The modules and folders of the package, each with its first sentence."""
    lines = ["| room | what it is |", "| --- | --- |"]
    for path in sorted(package.iterdir(), key=lambda path: (path.is_dir(), path.name)):
        file = path / "__init__.py" if path.is_dir() else path
        if file.suffix == ".py" and file.exists():
            about = ast.get_docstring(ast.parse(file.read_text())) or ""
            first = about.split("\n\n")[0].replace("\n", " ").rstrip(":")
            lines.append(f"| `{path.name}{'/' * path.is_dir()}` | {first} |")
    return "\n".join([*lines, ""])


def headline(table: pd.DataFrame, results: Mapping[str, TaskResults]) -> str:
    """Numbers of all tasks together: planner calls, return and time, with their conditions."""
    pooled = table[table["task"] == ALL].set_index("setting")
    own, baseline = pooled.loc[CHOSEN], pooled.loc[BASELINE]
    means = mean_acts(results, CHOSEN), mean_acts(results, BASELINE)
    return (
        f"On {len(results)} tasks, each in its chosen mode, beside TD-MPC2 with the same planning budget:\n\n"
        f"- **{100 * own.planner_calls:.1f} % planner calls.** The baseline plans at every step.\n"
        f"- **{interval(own)} of the return.** This is the interquartile mean of all episodes with its 95 % "
        f"interval. The lowest task is {worst_task(table, CHOSEN)}.\n"
        f"- **{means[0]:.2f} ms an action instead of {means[1]:.2f} ms,** on average. The median is "
        f"{own.act_ms_median:.2f} ms instead of {baseline.act_ms_median:.2f} ms.\n"
    )


def in_time(path: Path) -> str:
    """How long an action takes at most where plans are made in the background; "" if it is not measured."""
    if not path.exists():
        return ""
    r = read_json(path)
    own, planner = r["sleeping"], PlannerConfig(**r["planner"]).in_words()
    median, nearly_all, longest = (f"{own['act_ms'][q]:.1f} ms" for q in ("p50", "p99.9", "p100"))
    kept = r["return_ratio_to_foreground"]
    ratio = with_interval(kept["ratio"], kept["low"], kept["high"])
    return (
        f"- **No action waits for a plan** with `background=True`, but an episode's first. In "
        f"{own['steps']:,} steps of {Path(r['config']['agent']).name} at {r['config']['hz']:g} Hz "
        f"({planner}) the median was {median}, the 99.9th percentile {nearly_all}, "
        f"and the longest took {longest}; the return was {ratio} of that of planning in the foreground. A "
        f"loop that only reads the clock, beside a busy process on each other core, stood still for up to "
        f"{r['clock']['pause_ms']['p100']:.1f} ms.\n"
    )


def refined_modes(corrector: str) -> list[str]:
    """The modes of a corrector that refine, the shortest plans first; the last has no fixed horizon."""
    return [Family(corrector, refined=True).mode_name(k) for k in HORIZONS] + [f"{corrector}_until{REFINED}"]


def mean_acts(results: Mapping[str, TaskResults], setting: str) -> float:
    """The mean time of an action in a setting, in ms, the mean of the tasks."""
    modes = modes_of(results, setting)
    return float(np.mean([act_mean(results[task], mode) for task, mode in modes.items()]))


def act_mean(results: TaskResults, mode: str) -> float:
    """The mean time of an action in a mode, in ms."""
    return float(results.summary.set_index("mode").loc[mode, "act_ms_mean"])


def overview(table: pd.DataFrame, results: Mapping[str, TaskResults]) -> str:
    """A row a task in Markdown: the chosen mode, what it keeps, and what it takes."""
    columns = ["task", "chosen mode", "return, ratio [95 %]", "planner calls", "act, mean (baseline's)"]
    lines = header(columns, words=2)
    for task, rows in table.groupby("task", sort=False):
        own = rows[rows["chosen"]].iloc[0]
        if task == ALL:
            act, baseline = (mean_acts(results, setting) for setting in (CHOSEN, BASELINE))
        else:
            act, baseline = (act_mean(results[task], mode) for mode in (own.setting, BASELINE))
        times = f"{act:.2f} ms ({baseline:.2f})"
        lines.append(line([task, own.setting, interval(own), f"{100 * own.planner_calls:.1f} %", times]))
    return "\n".join([*lines, ""])


def rivals(table: pd.DataFrame) -> str:
    """A row a task in Markdown: return ratios of the chosen mode, of six steps a plan, of simpler modes."""
    beside = [f"{name}_6{REFINED}" for name in ("two_tower", "temporal")]
    beside += ["naive_3", "naive_6", "prior", DISTILLED + REFINED]
    lines = header(["task", "chosen", *beside])
    for task, rows in table.groupby("task", sort=False):
        ratios = [rows[rows["chosen"]].iloc[0].return_ratio]
        ratios += list(rows.set_index("setting")["return_ratio"].reindex(beside))
        lines.append(line([task, *("" if isnan(ratio) else f"{ratio:.3f}" for ratio in ratios)]))
    return "\n".join([*lines, ""])


def pooled_rows(results: Mapping[str, TaskResults], table: pd.DataFrame) -> str:
    """All tasks together, a row a mode, in Markdown."""
    columns = ["mode", "return, mean of the ratios [95 %]", "interquartile mean [95 %]", "worst task"]
    lines = header([*columns, "planner calls", "fallbacks", "act, mean", "act, median", "act, p99"])
    for row in table[table["task"] == ALL].itertuples():
        ratios = [mean_of_tasks(results, row.setting), interval(row), worst_task(table, row.setting)]
        calls = [f"{100 * x:.1f} %" for x in (row.planner_calls, row.fallbacks)]
        acts = mean_acts(results, row.setting), row.act_ms_median, row.act_ms_p99
        times = [f"{x:.2f} ms" for x in acts]
        lines.append(line([row.setting, *ratios, *calls, *times]))
    return "\n".join([*lines, ""])


def mean_of_tasks(results: Mapping[str, TaskResults], setting: str) -> str:
    """The mean of the tasks' return ratios in a setting, with its interval."""
    return mean_with_interval(paired_returns(results, modes_of(results, setting)))


def mean_with_interval(pairs: list[np.ndarray]) -> str:
    """The mean over tasks of ratios of returns, each task's `[2, n]`, with its interval."""
    mean = float(mean_ratio([pair[:, None] for pair in pairs])[0])
    return with_interval(mean, *stratified_interval(pairs, mean_ratio))


def worst_task(table: pd.DataFrame, setting: str) -> str:
    """The lowest return ratio of a setting on any task, and which task that is."""
    tasks = table[table["task"] != ALL]
    own = tasks[tasks["chosen"] if setting == CHOSEN else tasks["setting"] == setting]
    worst = own.loc[own["return_ratio"].idxmin()]
    return f"{worst.return_ratio:.3f} ({worst.task})"


def commits(folders: list[Path]) -> str:
    """The commit that each task was evaluated at, in Markdown."""
    at: dict[str, list[str]] = {}
    for folder in folders:
        at.setdefault(read_json(folder / "provenance.json")["commit"], []).append(folder.name)
    return "; ".join(f"{', '.join(names)}: commit {commit}" for commit, names in at.items()) + ".\n"


def correctors(results: Mapping[str, TaskResults], table: pd.DataFrame) -> str:
    """The two correctors side by side, a row an execution horizon, and which one to use, in Markdown."""
    both = first, second = [name for name in ARCHITECTURES if name != DISTILLED]
    columns = [f"{name}{what}" for what in (", ratio [95 %]", " better", ", act") for name in both]
    lines, wins, comparisons = header(["execution", *columns]), Counter[str](), 0
    pooled = table[table["task"] == ALL].set_index("setting")
    for mode_a, mode_b in zip(refined_modes(first), refined_modes(second), strict=True):
        if not {mode_a, mode_b} <= set(pooled.index):
            continue
        better = dict.fromkeys(both, 0)
        for task in results.values():
            by_mode = task.episodes.pivot(index="seed", columns="mode", values="return")
            _, low, high = paired_ratio(by_mode[mode_a].to_numpy(), by_mode[mode_b].to_numpy())
            better[first] += low > 1
            better[second] += high < 1
        rows = [pooled.loc[mode] for mode in (mode_a, mode_b)]
        cells = [mode_a.removeprefix(f"{first}_").removesuffix(REFINED), *map(interval, rows)]
        cells += [f"{n} of {len(results)} tasks" for n in better.values()]
        lines.append(line(cells + [f"{row.act_ms_median:.2f} ms" for row in rows]))
        wins.update(better)
        comparisons += len(results)
    chosen = Counter(name for task in results.values() for name in both if task.chosen.startswith(name))
    lines += ["", "Better: the 95 % interval of the ratio of the two returns, paired by seed, leaves 1 out."]
    lines += [
        f"Of {len(results)} tasks, `{first}` was chosen on {chosen[first]}, `{second}` on {chosen[second]}."
    ]
    lines.append(
        f"In {wins.total()} of {comparisons} comparisons they differ: `{first}` is better in {wins[first]}."
    )
    one, why = first, "it is simpler"
    for counts, what in ((wins, "it is better more often"), (chosen, "it is chosen more often")):
        if counts[first] != counts[second]:
            one, why = max(both, key=lambda name: counts[name]), what
            break
    lines.append(f"If you train only one, train `{one}`: {why}.")
    return "\n".join([*lines, ""])


def when_not(
    table: pd.DataFrame, results: Mapping[str, TaskResults], perturbations: pd.DataFrame | None
) -> str:
    """Where speculation did not pay, or something simpler did as well, in Markdown."""
    table = table[table["task"] != ALL]
    holds = table["return_ratio_low"] >= MIN_RETURN
    longer = []
    for task in results.values():
        times = task.latency[task.latency["kind"].isin(PLANS)].groupby("mode")["act_ms"].median()
        longer.append(times.get(task.chosen, times[BASELINE]) / times[BASELINE])
    lines = [
        "- **You have a deadline and a single core.** Planning in the background needs a core of its own. "
        "In the foreground fewer steps plan, but each of them takes "
        f"{min(longer):.2f} to {max(longer):.2f} times as long as a step of the baseline (medians, by task)."
    ]
    stays = list(table.loc[table["chosen"] & (table["setting"] == BASELINE), "task"])
    lines.append(
        "- **The return needs a new plan at every step.** "
        + (f"This is so on {', '.join(stays)}. " if stays else "This is so on no task measured here. ")
        + "`tdmpc2 accelerate` then chooses the baseline."
    )
    calls = table["task"].map(table[table["chosen"]].set_index("task")["planner_calls"])
    enough = table[holds & table["setting"].isin(SIMPLER) & (table["planner_calls"] <= calls)]
    kept = [
        f"{r.task} ({r.setting} {interval(r)}; {beside_chosen(r.task, r.setting, perturbations)})"
        for r in enough.itertuples()
    ]
    lines.append(
        "- **Something simpler is enough,** with no more planner calls: "
        + (f"{', '.join(kept)}. " if kept else "on no task measured here. ")
        + "The report names such modes. `tdmpc2 perturb` shows what they keep under perturbations."
    )
    fell = [f"{r.task} ({r.setting} {interval(r)})" for r in table[table["chosen"] & ~holds].itertuples()]
    lines.append(
        f"- **You need {MIN_RETURN} of the return for certain.** "
        + (
            f"The lower end of the interval on held-out seeds is below it on {', '.join(fell)}."
            if fell
            else "The lower end of the interval on held-out seeds is below it on no task measured here."
        )
    )
    if perturbations is not None:
        own = perturbations[(perturbations["mode"] == CHOSEN) & (perturbations["kind"] != UNPERTURBED)]
        lost = own[own["return_ratio"] < MIN_RETURN_PERTURBED].sort_values("return_ratio")
        cells = [f"{r.task}, {perturbation(r.kind, r.strength)} ({interval(r)})" for r in lost.itertuples()]
        unsure = (own["return_ratio_low"] < MIN_RETURN_PERTURBED).sum()
        lines.append(
            "- **Your world differs from the model.** The chosen mode keeps less than "
            f"{MIN_RETURN_PERTURBED} of what replanning keeps in {len(lost)} of {len(own)} pairs of a task "
            "and a perturbation"
            + (f": {', '.join(cells)}" if cells else "")
            + f". The lower end of the interval is below it in {unsure}."
        )
    return "\n".join([*lines, ""])


def beside_chosen(task: str, setting: str, perturbations: pd.DataFrame | None) -> str:
    """How often a setting is at least as good as the chosen one under perturbation, in words."""
    if perturbations is not None:
        own = perturbations[(perturbations["task"] == task) & (perturbations["kind"] != UNPERTURBED)]
        ratios = own.pivot(index=["kind", "strength"], columns="mode", values="return_ratio")
        if setting in ratios:
            as_good = (ratios[setting] >= ratios[CHOSEN]).sum()
            return f"as good as the chosen mode under {as_good} of {len(ratios)} perturbations"
    return "not tried under perturbation"


def perturbation(kind: str, strength: float) -> str:
    if kind == UNPERTURBED:
        return kind
    return f"{kind.replace('_', ' ')} {strength}"


def perturbed_tables(tasks: list[Path]) -> pd.DataFrame | None:
    """A row for each task, perturbation (first none) and mode; None where nothing was measured."""
    tables = []
    for folder in tasks:
        path = folder / "perturbed" / "summary.csv"
        if path.exists():
            chosen, table = read_json(folder / "chosen.json")["mode"], pd.read_csv(path)
            about, agent = (read_json(p / "provenance.json") for p in (path.parent, folder))
            if about["correctors"] != agent["correctors"] or chosen not in set(table["mode"]):
                raise DataError(f"{path} is of another agent than {folder}: perturb this one")
            table = pd.concat([unperturbed(folder, about["seeds"]), table], ignore_index=True)
            own = table[table["mode"] == chosen].assign(mode=CHOSEN)
            tables.append(pd.concat([table, own]).assign(task=folder.name))
    return pd.concat(tables, ignore_index=True) if tables else None


def unperturbed(folder: Path, seeds: list[int]) -> pd.DataFrame:
    """What a table of perturbations begins with: the same seeds in the world as it is."""
    episodes = pd.read_csv(folder / "episodes.csv")
    episodes = episodes[episodes["seed"].isin(seeds)]
    if set(seeds) - set(episodes["seed"]):
        raise DataError(f"{folder}/perturbed has seeds that {folder} lacks: give it the same evaluation.seed")
    sums = episodes.groupby("mode", sort=False).sum()
    returns = episodes.pivot(index="seed", columns="mode", values="return")
    table = sums[["planner_calls", "fallbacks"]].div(sums["length"], axis=0)
    ratios = [paired_ratio(returns[mode].to_numpy(), returns[BASELINE].to_numpy()) for mode in table.index]
    table[["return_ratio", "return_ratio_low", "return_ratio_high"]] = ratios
    return table.reset_index().assign(kind=UNPERTURBED, strength=0.0)


def perturbed(table: pd.DataFrame | None) -> str:
    """What modes keep of what replanning at every step keeps under the same perturbation, in Markdown."""
    if table is None:
        return "Not measured yet.\n"
    modes = [CHOSEN, "naive_6", DISTILLED + REFINED, "prior"]
    columns = ["perturbation", "tasks", "chosen, worst task", *modes, "chosen not below distilled"]
    columns += [f"{what} of {CHOSEN} (unperturbed)" for what in ("planner calls", "fallbacks")]
    lines = header(columns)
    calm = table[(table["mode"] == CHOSEN) & (table["kind"] == UNPERTURBED)].set_index("task")
    for (kind, strength), rows in table.groupby(["kind", "strength"], sort=False):
        ratio = rows.pivot(index="task", columns="mode", values="return_ratio")
        own = rows[rows["mode"] == CHOSEN]
        least = own.loc[own["return_ratio"].idxmin()]
        worst = f"{interval(least)} ({least.task})"
        cells = [perturbation(kind, strength), str(len(ratio)), worst]
        cells += [f"{mean:.3f}" for mean in ratio.mean().reindex(modes)]
        cells.append(f"{(ratio[CHOSEN] >= ratio[DISTILLED + REFINED]).sum()} of {len(ratio)}")
        for name in ("planner_calls", "fallbacks"):
            usual = calm.loc[own["task"], name].mean()
            cells.append(f"{100 * own[name].mean():.1f} % ({100 * usual:.1f})")
        lines.append(line(cells))
    n = " or ".join(f"{n:.0f}" for n in sorted(table["episodes"].dropna().unique()))
    hardest = table["strength"] == table["kind"].map(HARDEST)
    own = table[(table["mode"] == CHOSEN) & hardest].set_index("task")["fallbacks"]
    usual = calm.loc[own.index, "fallbacks"].to_numpy()
    more, twice = (own > usual).sum(), (own >= 2 * usual).sum()
    words = (
        f"Means over the tasks, {n} episodes of each. The columns of modes are ratios. A ratio far above 1 "
        "means that replanning itself fails there. So few episodes show a large loss only.\n\n"
        "The chosen mode falls back more often under the hardest perturbation of a kind than without one in "
        f"{more} of {len(own)} pairs of a task and a kind, at least twice as often in {twice}."
    )
    return "\n".join([*lines, "", words, "", ""])


def header(columns: list[str], words: int = 1) -> list[str]:
    """The first two lines of a table in Markdown; the first `words` columns are not numbers."""
    return [line(columns), "|" + " --- |" * words + " ---: |" * (len(columns) - words)]


def line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def interval(row: Any) -> str:
    return with_interval(row.return_ratio, row.return_ratio_low, row.return_ratio_high)


def shipped_agents(folder: Path) -> str:
    """A table of the accelerated agents in `pretrained/`, in Markdown."""
    columns = ["agent", "mode", "episodes", "return ratio [95 %]", "planner calls", "ms a step", "baseline"]
    lines = header(columns, words=2)
    made = {}
    for path in sorted(folder.glob("*/evaluation/chosen.json")):
        task, mode = path.parents[1].name, read_json(path)["mode"]
        about = read_json(path.with_name("provenance.json"))
        summary = pd.read_csv(path.with_name("summary.csv")).set_index("mode")
        own = summary.loc[mode]
        ratio = f"{own['return_ratio']:.3f} [{own['return_ratio_low']:.3f}, {own['return_ratio_high']:.3f}]"
        times = [f"{summary.loc[m, 'act_ms_mean']:.2f}" for m in (mode, BASELINE)]
        calls = f"{100 * own['planner_calls']:.1f} %"
        lines.append(line([task, f"`{mode}`", f"{own['episodes']:.0f}", ratio, calls, *times]))
        made[about["command"]] = f"commit {about['commit']}, {about['machine']}"
    commands = [f"- `{command}`, {where}" for command, where in made.items()]
    return "\n".join([*lines, "", "Made by", "", *commands, ""])


def teachers(folder: Path) -> str:
    """A table of the shipped teachers in Markdown."""
    published = pd.read_csv(folder / "published_returns.csv", index_col="task")
    columns = [
        "teacher",
        "snapshot at",
        "return, mean",
        "sd",
        "published",
        "steps an episode",
        "planning budget",
    ]
    lines = [line(columns), "| --- | ---: | ---: | ---: | ---: | ---: | --- |"]
    for path in sorted(folder.glob("*/evaluation/evaluation.json")):
        result, config = read_json(path), read_json(path.parents[1] / "config.json")
        budget = "{num_samples} samples, {iterations} iterations, {num_elites} elites".format(
            **result["planner"]
        )
        task = path.parents[1].name
        cells = [task, f"{config['step']:,} steps", f"{result['mean']:.1f}", f"{result['sd']:.1f}"]
        if task in published.index:
            reached = published.loc[task]
            cells.append(f"{reached['step_100k']:.0f}, {reached['last']:.0f}")
        else:
            cells.append("")
        length = pd.read_csv(path.with_name("episodes.csv"))["length"].mean()
        lines.append(line([*cells, f"{length:.0f}", budget]))
    commands = [command(path.parent) for path in sorted(folder.glob("*/train_config.json"))]
    return "\n".join([*lines, "", "Made by", "", "```sh", *commands, "```", ""])


def speed(results: Path) -> str:
    """What `make bench` measured, and what bfloat16 costs, in Markdown."""
    precision = [precision_line(path) for path in sorted((results / "precision").glob("*.json"))]
    if not (results / "bench.json").exists():
        return "\n".join(["`make bench` has no results here yet.", "", *precision, ""])
    bench = read_json(results / "bench.json")
    columns = ["what", "size", "batch", "precision", "time", "/ limit", "times faster than plain"]
    lines = header(columns)
    for r in bench["records"]:
        name = r["name"].replace("_", " ")
        seconds = r["seconds"]
        time = f"{seconds:.2f} s" if seconds >= 1 else f"{1e3 * seconds:.2f} ms"
        if r["p99_seconds"] is not None:
            time += f" (p99 {1e3 * r['p99_seconds']:.2f} ms)"
        if r["resident_growth_bytes"] is not None:
            name += f", which grew by {r['resident_growth_bytes'] / 2**20:.1f} MiB in {r['steps']:,} steps"
        ratios = (r["ratio_to_ceiling"], r["speedup_over_reference"])
        cells = [name, f"{r['size']}M", str(r["batch"]), r["dtype"], time]
        cells += ["" if x is None else f"{x:.2f}" for x in ratios]
        lines.append(line(cells))
    lines += ["", f"`{bench['command']}` at commit {bench['commit']}, {bench['machine']}.", ""]
    return "\n".join([*lines, *precision, ""])


def exported(path: Path) -> str:
    """What `research/export_latency.py` measured, in Markdown."""
    if not path.exists():
        return "`python research/export_latency.py` has no results here yet.\n"
    content = read_json(path)
    lines = header(["task", "a step that", "threads", "median", "slowest", "largest difference"], words=2)
    for r in content["records"]:
        times = [f"{r[name]:.2f} ms" for name in ("median_ms", "slowest_ms")]
        lines.append(line([r["task"], r["step"], str(r["threads"]), *times, f"{r['difference']:.0e}"]))
    return "\n".join([*lines, "", made_by(content), ""])


def precision_line(path: Path) -> str:
    r = read_json(path)
    return (
        f"Planning in bfloat16 keeps {r['ratio']:.4f} [{r['low']:.4f}, {r['high']:.4f}] of the return of "
        f"planning in float32 on {path.stem}, {r['episodes']} paired episodes (`{r['command']}` at commit "
        f"{r['commit']})."
    )


def command(folder: Path) -> str:
    """The training command of a teacher, its settings where they are not the defaults, and its commit."""
    settings = flat(read_json(folder / "train_config.json"))
    usual = flat(asdict(TrainConfig(task="")))
    # Runs of earlier versions have no parts: update.lr was lr, evaluation.freq was eval_freq.
    usual |= {name.replace("evaluation.", "eval_").rpartition(".")[2]: value for name, value in usual.items()}
    given = [
        f"{name}={value}"
        for name, value in sorted(settings.items(), key=lambda item: item[0] != "task")
        if name not in ("work_dir", "resume") and value != usual.get(name)
    ]
    commit = read_json(folder / "config.json")["provenance"]["commit"]
    return " ".join(["tdmpc2 train", *given, f" # at {commit}"])


def section(folder: Path, results: TaskResults) -> str:
    """One task's table in Markdown, with where its numbers come from."""
    summary, about = results.summary, read_json(folder / "provenance.json")
    lines = [f"### {folder.name}", "", f"{summary['episodes'].iloc[0]} held-out episodes a mode.", ""]
    lines += header(COLUMNS)
    for row in summary.itertuples():
        name = f"**{row.mode}** (chosen)" if row.mode == results.chosen else row.mode
        cells = [name, f"{row.return_mean:.1f}", interval(row), f"{100 * row.planner_calls:.1f} %"]
        cells += [f"{row.act_ms_median:.2f} ms", f"{row.act_ms_mean:.2f} ms"]
        lines.append(line(cells))
    lines += ["", made_by(about)]
    if "trained" in about:
        lines.append(f"Data and correctors: {about['trained']}.")
    return "\n".join([*lines, "", ""])


class Experiments:
    """The experiments on one task.

    Args:
        path: the episodes; where they come from is beside them.
    """

    def __init__(self, path: Path):
        self.task, self.about = path.stem, read_json(path.with_suffix(".json"))
        episodes = pd.read_csv(path, keep_default_na=False)
        self.seeds = episodes["seed"].nunique()
        keys = ["experiment", "variant", "disturbance"]
        self.variants = {key: rows.set_index("seed") for key, rows in episodes.groupby(keys, sort=False)}
        trained = episodes.loc[episodes["experiment"] == "as it is", "variant"].iloc[0]
        self._trained = ("as it is", trained)

    def reference(self, experiment: str) -> tuple[str, str]:
        """What the variants of an experiment are compared with."""
        own = self.about["as_it_is"]
        if experiment == BUDGET:
            return FULL_BUDGET
        return (experiment, own[experiment]) if experiment in own else self._trained

    def returns(self, key: tuple[str, str, str], other: tuple[str, str]) -> np.ndarray | None:
        """`[2, n]`, the returns of a variant and of another one on the same seeds in the same world.

        None where the other was not tried in that world.
        """
        if (*other, key[2]) not in self.variants:
            return None
        own = self.variants[key]["return"]
        return np.stack([own, self.variants[(*other, key[2])]["return"].loc[own.index]])

    def planner_calls(self, key: tuple[str, str, str]) -> float:
        own = self.variants[key]
        return float(own["planner_calls"].sum() / own["length"].sum())


def experiments(own: Experiments) -> str:
    """The experiments on one task in Markdown, with where their numbers come from."""
    columns = ["experiment", "variant", "perturbation", "return, ratio [95 %]", "planner calls"]
    lines = [f"## {own.task}", "", *header([*columns, "against the reference [95 %]"], words=3)]
    for key in own.variants:
        others = (BASELINE, BASELINE), own.reference(key[0])
        ratios = [compared([own.returns(key, other)], itself=other == key[:2]) for other in others]
        lines.append(line([*key, ratios[0], f"{100 * own.planner_calls(key):.1f} %", ratios[1]]))
    about = own.about
    lines += ["", f"{own.seeds} episodes a row. `{about['command']}` at commit"]
    return "\n".join([*lines, f"{about['commit']}, {about['machine']}.", "", ""])


def compared(pairs: list[np.ndarray | None], *, itself: bool) -> str:
    """The mean of ratios of returns, each pair's `[2, n]`, with its interval; empty where one is missing."""
    if itself:
        return "reference"
    both = [pair for pair in pairs if pair is not None]
    if len(both) < len(pairs):
        return ""
    if len(both) == 1:
        return with_interval(*paired_ratio(*both[0]))
    return mean_with_interval(both)


def all_experiments(measured: list[Experiments]) -> str:
    """Every variant that all tasks have beside its reference, the tasks together, in Markdown."""
    shared = [key for key in measured[0].variants if all(key in own.variants for own in measured)]
    worlds = list(dict.fromkeys(world for _, _, world in shared))
    columns = ["experiment", "variant"]
    for world in worlds:
        columns += [f"{world or 'as modelled'}, ratio [95 %]", "planner calls"]
    names = " and ".join(own.task for own in measured)
    lines = [f"## {names} together", "", *header(columns, words=2)]
    for experiment, variant in dict.fromkeys(key[:2] for key in shared):
        cells = [experiment, variant]
        for world in worlds:
            key = (experiment, variant, world)
            if key not in shared:
                cells += ["", ""]
                continue
            pairs = [own.returns(key, own.reference(experiment)) for own in measured]
            ratio = compared(pairs, itself=measured[0].reference(experiment) == key[:2])
            calls = np.mean([own.planner_calls(key) for own in measured])
            cells += [ratio, f"{100 * calls:.1f} %"]
        lines.append(line(cells))
    words = "Means over the tasks of the return ratios to the reference of each experiment."
    return "\n".join([*lines, "", words, "", ""])


def published_modes(folder: Path) -> str:
    """One task's published modes, with either loss, not refined and refined, in Markdown."""
    summary, about = pd.read_csv(folder / "summary.csv"), read_json(folder / "provenance.json")
    lines = [f"## {folder.name}", ""]
    lines += header(
        ["mode", "loss", "return, ratio [95 %]", "planner calls", "correction", "action change"], 2
    )
    for row in summary.itertuples():
        mode, _, loss = row.mode.partition(", ")
        correction = "" if isnan(row.delta_a) or not loss else f"{row.delta_a:.3f}"
        cells = [mode, loss, interval(row), f"{100 * row.planner_calls:.1f} %", correction]
        lines.append(line([*cells, f"{row.action_change:.3f}"]))
    lines += ["", f"{summary['episodes'].iloc[0]} episodes a mode. {made_by(about)}", "", ""]
    return "\n".join(lines)


def rules(path: Path) -> str:
    """One task's comparison of rules in Markdown, a row a rule, two columns a world."""
    episodes, about = pd.read_csv(path), read_json(path.with_suffix(".json"))
    worlds = list(dict.fromkeys(episodes["world"]))
    lines = [f"## {path.stem}", ""]
    lines += header(["rule", *(f"{w}: {what}" for w in worlds for what in ("ratio [95 %]", "planner calls"))])
    for rule in dict.fromkeys(episodes["rule"]):
        cells = [rule]
        for world in worlds:
            own, base = (
                episodes[(episodes["world"] == world) & (episodes["rule"] == r)] for r in (rule, BASELINE)
            )
            ratio = paired_ratio(own["return"].to_numpy(), base["return"].to_numpy())
            cells += [
                with_interval(*ratio),
                f"{100 * own['planner_calls'].sum() / own['length'].sum():.1f} %",
            ]
        lines.append(line(cells))
    lines += ["", f"{len(own)} episodes a cell. {made_by(about)}", "", ""]
    return "\n".join(lines)


def late_plans(path: Path, table: pd.DataFrame) -> str:
    """One task's return where plans come late, in Markdown: a row a mode, a column a delay.

    From `table`, of all evaluations, comes the mode that never plans.
    """
    episodes, about = pd.read_csv(path), read_json(path.with_suffix(".json"))
    by = {key: own["return"].to_numpy() for key, own in episodes.groupby(["mode", "delay"], sort=False)}
    sums = episodes.groupby(["mode", "delay"])[["planner_calls", "length"]].sum()
    calls = 100 * sums["planner_calls"] / sums["length"]
    delays = sorted(episodes["delay"].unique())
    columns = ["mode", *(f"d = {delay}" for delay in delays), f"planner calls, d = {delays[-1]}"]
    lines = [f"### {path.stem}", "", *header(columns)]
    for mode in dict.fromkeys(mode for mode, _ in by if mode != BASELINE):
        ratios = [
            with_interval(*paired_ratio(by[mode, d], by[BASELINE, 0])) if (mode, d) in by else ""
            for d in delays
        ]
        lines.append(line([mode, *ratios, f"{calls[mode, delays[-1]]:.1f} %"]))
    n = len(by[BASELINE, 0])
    lines += ["", f"{n} paired episodes; the teacher without delay returns {by[BASELINE, 0].mean():.1f}."]
    alone = table[(table["task"] == path.stem) & (table["setting"] == DISTILLED + REFINED)]
    for ratio in alone[["return_ratio", "return_ratio_low", "return_ratio_high"]].to_numpy():
        kept = with_interval(*ratio)
        lines[-1] += f" `{DISTILLED + REFINED}` never plans: it keeps {kept} in other episodes."
    return "\n".join([*lines, made_by(about), "", ""])


def soak(path: Path) -> str:
    """The slowest steps of a long run, in Markdown."""
    r = read_json(path)
    where = "a thread" if r["config"]["thread"] else "a process"
    planner = PlannerConfig(**r["planner"]).in_words()
    lines = [f"Planning in {where}, {planner}:", ""]
    columns = ["loop", "steps", "plans taken", "without a plan, median", "p50", "p99", "p99.9", "longest"]
    lines += header([*columns, "clock, p99", "clock, p99.9", "clock, longest"])
    names = {
        "sleeping": f"sleeps until the next tick of {r['config']['hz']:g} Hz",
        "tight": "without a pause",
        "busy": "sleeps; a busy process on each core",
        "killed": f"sleeps; the planner is killed {r['config']['kills']} times",
        "clock": "the clock alone; a busy process on each core but one",
    }
    for name, words in names.items():
        if name not in r:
            continue
        own = r[name]
        act, pause = own.get("act_ms", {}), own["pause_ms"]
        times = [own.get("without_plan_ms_median"), *map(act.get, ("p50", "p99", "p99.9", "p100"))]
        times += [pause[q] for q in ("p99", "p99.9", "p100")]
        cells = ["" if ms is None else f"{ms:.2f} ms" for ms in times]
        plans = f"{own['plans']['taken']:,} of {own['plans']['asked']:,}" if "plans" in own else ""
        lines.append(line([words, f"{own['steps']:,}", plans, *cells]))
    memory = [sum(x) for x in r["sleeping"]["memory_mib"] + r["tight"]["memory_mib"]]
    ratio, killed = r["return_ratio_to_foreground"], r.get("killed")
    if killed:
        after = f"{killed['late']} of {killed['steps']:,} actions took longer than a step of the clock."
        if steps := killed.get("steps_to_recover"):
            after += (
                f" After {len(steps)} of {r['config']['kills']} kills a new plan came before the next kill "
                f"or the episode's end; the median took {np.median(steps):.0f} steps."
            )
        lines += ["", f"Where the planner is killed, {after}"]
    episodes = r["config"]["evaluation"]["episodes"]
    lines += [
        "",
        f"All processes together held {memory[0]:.0f} MiB at the start and {memory[-1]:.0f} MiB at the end. "
        f"The return is {with_interval(ratio['ratio'], ratio['low'], ratio['high'])} of that of the same "
        f"agent planning in the foreground, where the world waits ({episodes} episodes there). "
        f"{made_by(r['provenance'])}",
        "",
        "",
    ]
    return "\n".join(lines)


def steps_without_plan(path: Path) -> str:
    """How long a step without a plan takes beside its matrix products, in Markdown."""
    if not path.exists():
        return "`research/step.py` has no results here yet.\n"
    r = read_json(path)
    names = ["products", "library", "act"]
    asleep = [f"{name}, sleeping" for name in names]
    lines = header(["refining", *names, *(f"{name} at {r['hz']:g} Hz" for name in names)])
    for row in r["rows"]:
        ahead = f"{row['refine_steps']} ahead, {row['rows']} rows" if row["refine_steps"] else "none"
        cells = [
            f"{row[name]:.2f} ms ({row[name] / row[of[0]]:.2f})" for of in (names, asleep) for name in of
        ]
        lines.append(line([ahead, *cells]))
    return "\n".join([*lines, "", made_by(r["provenance"]), ""])


def searches(path: Path) -> str:
    """One task's return for several sizes of refining's search, in Markdown: a row a number of rows."""
    episodes, about = pd.read_csv(path), read_json(path.with_suffix(".json"))
    by = {
        key: own["return"].to_numpy() for key, own in episodes.groupby(["refine_steps", "rows"], sort=False)
    }
    ahead, rows = ([*dict.fromkeys(key[i] for key in by if key[0])] for i in (0, 1))
    lines = [f"### {path.stem}", "", *header(["rows", *(f"{n} ahead, ratio [95 %]" for n in ahead)])]
    for n in rows:
        ratios = [with_interval(*paired_ratio(by[steps, n], by[0, 0])) for steps in ahead]
        lines.append(line([str(n), *ratios]))
    beside = f"the same mode, {about['config']['mode']}, without refining: it returns {by[0, 0].mean():.1f}"
    lines += ["", f"{len(by[0, 0])} episodes a cell. Ratios are to {beside}. {made_by(about['provenance'])}"]
    return "\n".join([*lines, "", ""])


def real_time(folders: list[Path]) -> str:
    """Returns at control frequencies, in Markdown."""
    if not folders:
        return "No results yet.\n"
    lines = ["![Return against control frequency](realtime.svg)", ""]
    for folder in folders:
        episodes, about = pd.read_csv(folder / "realtime.csv"), read_json(folder / "realtime.json")
        returns = episodes.groupby(["agent", "hz"], sort=False)["return"].agg(["mean", "min", "max"])
        agents = list(dict.fromkeys(episodes["agent"]))
        lines += [f"### {folder.name}", "", *header(["Hz", *agents])]
        for hz in sorted(episodes["hz"].unique()):
            cells = [returns.loc[agent, hz].round().astype(int) for agent in agents]
            lines.append(line([f"{hz:g}", *(f"{x['mean']} [{x['min']}, {x['max']}]" for x in cells)]))
        ours = episodes[episodes["agent"] == agents[-1]]
        planner = PlannerConfig(**about["planner"]).in_words()
        n = episodes["seed"].nunique()
        own = f"; the task's own frequency is {about['own_hz']:g} Hz" if about["own_hz"] else ""
        lines += [
            "",
            f"Mean, lowest and highest return of {n} episodes; {planner}{own}. In the last column at most "
            f"{100 * ours['late'].max():.1f} % of an episode's steps were late, and the longest action took "
            f"{ours['act_ms_max'].max():.0f} ms. {made_by(about['provenance'])}",
            "",
        ]
    return "\n".join([*lines, ""])


def draw_real_time(paths: list[Path], path: Path) -> None:
    """Return against control frequency, one panel a task, as `tdmpc2 evaluate realtime=true` draws it."""
    figure, panels = plt.subplots(
        1, len(paths), figsize=(1 + 4.4 * len(paths), 4.2), squeeze=False, layout="constrained"
    )
    for axes, source in zip(panels.flat, paths, strict=True):
        episodes, about = pd.read_csv(source), read_json(source.with_suffix(".json"))
        ours = episodes["agent"].iloc[-1]  # in each task its own mode
        episodes = episodes.replace({"agent": {ours: "ours, planning in the background"}})
        realtime.draw(axes, episodes, source.parent.name, about["own_hz"])
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)
    with atomic_write(path) as tmp:
        figure.savefig(tmp, format="svg", metadata={"Date": None})
    plt.close(figure)


def made_by(about: Mapping[str, str]) -> str:
    """Where numbers come from, in one sentence."""
    return f"`{about['command']}` at commit {about['commit']}, {about['machine']}."


def draw(tasks: Mapping[str, TaskResults], path: Path) -> None:
    """Return ratio against planner calls, one panel a task, the execution horizons of a corrector joined."""
    across = min(len(tasks), 3)
    down = -(-len(tasks) // across)
    figure, panels = plt.subplots(
        down, across, figsize=(2 + 4.4 * across, 3.8 * down), squeeze=False, layout="constrained"
    )
    for axes in panels.flat[len(tasks) :]:
        axes.remove()
    modes = [*dict.fromkeys(mode for results in tasks.values() for mode in results.summary["mode"])]
    for axes, (task, results) in zip(panels.flat, tasks.items(), strict=False):
        for corrector in ARCHITECTURES:  # of one, from the shortest execution to the longest
            own = results.summary[results.summary["mode"].isin(refined_modes(corrector))]
            axes.plot(100 * own["planner_calls"], own["return_ratio"], color="0.75", lw=1, zorder=0)
        for row in results.summary.itertuples():
            i = modes.index(row.mode)
            x = 100 * row.planner_calls
            axes.plot(x, row.return_ratio, "osDv^<>PX*hp"[i % 12], ms=9, label=row.mode, color=f"C{i % 10}")
            axes.plot([x, x], [row.return_ratio_low, row.return_ratio_high], color=f"C{i % 10}")
        axes.axhline(1.0, color="black", lw=0.8, ls=":")
        axes.set(title=task, xlabel="planner calls, % of steps")
        axes.set_ylabel("return, ratio to the baseline")
        axes.spines[["top", "right"]].set_visible(False)
    most = max(figure.axes, key=lambda axes: len(axes.get_legend_handles_labels()[1]))
    figure.legend(*most.get_legend_handles_labels(), loc="outside right upper", frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as tmp:
        figure.savefig(tmp, format="svg", metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    run(Settings, main)
