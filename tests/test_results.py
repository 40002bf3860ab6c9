"""The numbers in README, docs and `results/speculation.csv` are what the script makes of the raw results."""

import json
import re
import shutil
import sys
from pathlib import Path

import pandas as pd
import pytest

from research import write_results
from tdmpc2 import cli
from tdmpc2.errors import DataError
from tdmpc2.evaluation.aggregate import TaskResults, speculation_table

ROOT = Path(__file__).parents[1]


def test_nothing_is_typed_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("results", "pretrained"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.safetensors"))
    pages = ["README.md", *(f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md"))]
    (tmp_path / "docs").mkdir()
    for page in pages:  # with empty blocks
        text = re.sub(r"(<!-- (\w+) -->\n).*?(<!-- /\2 -->)", r"\1\3", (ROOT / page).read_text(), flags=re.S)
        (tmp_path / page).write_text(text)
    (tmp_path / "results/speculation.csv").unlink()
    arguments = [f"{name}={tmp_path / name}" for name in ("results", "pretrained", "docs")]
    arguments.append(f"readme={tmp_path}/README.md")
    monkeypatch.setattr(sys, "argv", ["research/write_results.py", *arguments])
    monkeypatch.chdir(tmp_path)
    cli.run(write_results.Settings, write_results.main)
    for name in [*pages, "docs/front.svg", "results/speculation.csv"]:
        assert (tmp_path / name).read_text() == (ROOT / name).read_text(), f"{name} is out of date"


def test_any_page_takes_any_block() -> None:
    blocks, page = {"one": "1\n", "two": "2\n"}, Path("a.md")
    content = "<!-- two -->\nold\n<!-- /two -->\n<!-- one -->\n<!-- /one -->\n<!-- not run: slow -->\n"
    filled = "<!-- two -->\n2\n<!-- /two -->\n<!-- one -->\n1\n<!-- /one -->\n<!-- not run: slow -->\n"
    assert write_results.filled(content, blocks, page) == filled
    assert write_results.filled(filled, blocks, page) == filled
    for wrong in ("<!-- one -->\n", "<!-- /one -->\n", "<!-- three -->\n<!-- /three -->\n"):
        with pytest.raises(DataError, match=r"a\.md: the marks (one|three) stand alone or name no block"):
            write_results.filled(content + wrong, blocks, page)


def experiments_on(folder: Path, task: str, returns: dict[tuple[str, str, str], float]) -> Path:
    """Two episodes of each variant, all with one return."""
    rows = [
        {"seed": seed, "return": value, "length": 10, "planner_calls": int(value) % 10}
        | dict(zip(("experiment", "variant", "disturbance"), key, strict=True))
        for key, value in returns.items()
        for seed in ((1, 2) if key[0] != "plan" else (2, 1))  # in any order
    ]
    path = folder / f"{task}.csv"
    pd.DataFrame(rows).to_csv(path, index=False)
    about = {"as_it_is": {"plan": "usual"}, "command": "it", "commit": "abc", "machine": "here"}
    path.with_suffix(".json").write_text(json.dumps(about))
    return path


def test_experiments_compare_with_what_the_package_does(tmp_path: Path) -> None:
    shared = {("baseline", "baseline", ""): 100.0, ("as it is", "so", ""): 80.0, ("plan", "usual", ""): 50.0}
    one = {**shared, ("loss", "other", ""): 88.0, ("plan", "longer", ""): 60.0, ("plan", "own", ""): 1.0}
    two = {**shared, ("loss", "other", ""): 72.0, ("plan", "longer", ""): 65.0}
    a, b = (
        write_results.Experiments(experiments_on(tmp_path, task, returns))
        for task, returns in {"a": one, "b": two}.items()
    )
    page = write_results.experiments(a)
    assert "| loss | other |  | 0.880 [0.880, 0.880] | 80.0 % | 1.100 [1.100, 1.100] |" in page
    assert "| as it is | so |  | 0.800 [0.800, 0.800] | 0.0 % | reference |" in page
    assert "| baseline | baseline |  | reference | 0.0 % | 1.250 [1.250, 1.250] |" in page
    together = write_results.all_experiments([a, b])
    assert "## a and b together" in together and "own" not in together
    assert "| loss | other | 1.000 [1.000, 1.000] | 50.0 % |" in together
    assert "| plan | longer | 1.250 [1.250, 1.250] | 25.0 % |" in together
    assert "| plan | usual | reference | 0.0 % |" in together


def results_of(returns: dict[str, list[float]], chosen: str, planned_ms: float) -> TaskResults:
    """Modes of ten steps an episode; all but the baseline plan in one of them."""
    episodes = pd.DataFrame(
        {"mode": mode, "seed": seed, "return": value, "length": 10, "planner_calls": calls, "fallbacks": 0}
        for mode, values in returns.items()
        for calls in [10 if mode == "baseline" else 1]
        for seed, value in enumerate(values)
    )
    latency = pd.DataFrame(
        {"mode": mode, "kind": kind, "act_ms": planned_ms if kind == "planned" else 1.0}
        for mode in returns
        for kind in (["planned"] if mode == "baseline" else ["planned", "corrected"])
    )
    means = episodes.groupby("mode", sort=False)["return"].mean()
    summary = pd.DataFrame(
        {
            "mode": mode,
            "episodes": len(returns[mode]),
            "return_mean": mean,
            "return_ratio": mean / means["baseline"],
            "return_ratio_low": mean / means["baseline"] - 0.1,
            "return_ratio_high": mean / means["baseline"] + 0.1,
            "planner_calls": 1.0 if mode == "baseline" else 0.1,
            "fallbacks": 0.0,
            "act_ms_median": planned_ms if mode == "baseline" else 1.0,
            "act_ms_p99": planned_ms,
            "act_ms_mean": planned_ms if mode == "baseline" else 0.1 * planned_ms + 0.9,
        }
        for mode, mean in means.items()
    )
    return TaskResults(summary, episodes, latency, chosen)


@pytest.fixture
def two_tasks() -> dict[str, TaskResults]:
    modes = {"baseline": [10.0, 10.0], "two_tower_6_refined": [9.0, 9.0], "temporal_6_refined": [12.0, 12.0]}
    worse = {"baseline": [10.0, 10.0], "two_tower_6_refined": [11.0, 11.0], "temporal_6_refined": [8.0, 8.0]}
    return {
        "a": results_of(modes, "temporal_6_refined", planned_ms=21.0),
        "b": results_of(worse, "two_tower_6_refined", planned_ms=41.0),
    }


def test_headline(two_tasks: dict[str, TaskResults]) -> None:
    text = write_results.headline(speculation_table(two_tasks), two_tasks)
    assert text.startswith("On 2 tasks") and "**10.0 % planner calls.**" in text
    assert "**1.150 [1.150, 1.150] of the return.**" in text and "lowest task is 1.100 (b)." in text
    assert "**4.00 ms an action instead of 31.00 ms,**" in text and "median is 1.00 ms instead of" in text


def test_which_corrector(two_tasks: dict[str, TaskResults]) -> None:
    text = write_results.correctors(two_tasks, speculation_table(two_tasks))
    assert "| 1 of 2 tasks | 1 of 2 tasks |" in text
    assert "In 2 of 2 comparisons they differ: `two_tower` is better in 1." in text
    assert "train `two_tower`: it is simpler." in text
    chosen = {"a": two_tasks["a"], "b": two_tasks["b"]._replace(chosen="temporal_6_refined")}
    text = write_results.correctors(chosen, speculation_table(chosen))
    assert "train `temporal`: it is chosen more often." in text
    only = {"b": two_tasks["b"]}
    text = write_results.correctors(only, speculation_table(only))
    assert "| 1 of 1 tasks | 0 of 1 tasks |" in text
    assert "train `two_tower`: it is better more often." in text


def test_when_not(two_tasks: dict[str, TaskResults]) -> None:
    text = write_results.when_not(speculation_table(two_tasks), two_tasks, None)
    assert "each of them takes 1.00 to 1.00 times as long" in text
    assert "seeds is below it on b (two_tower_6_refined 1.100 [1.000, 1.200])" not in text
    lower = {"a": two_tasks["a"]._replace(chosen="two_tower_6_refined")}
    text = write_results.when_not(speculation_table(lower), lower, None)
    assert "seeds is below it on a (two_tower_6_refined 0.900 [0.800, 1.000])" in text


def test_what_precedes_perturbations_is_of_their_seeds(tmp_path: Path) -> None:
    returns = {"baseline": [10.0, 20.0, 90.0], "naive": [5.0, 10.0, 90.0]}
    results_of(returns, "naive", 21.0).episodes.to_csv(tmp_path / "episodes.csv", index=False)
    table = write_results.unperturbed(tmp_path, [0, 1]).set_index("mode")
    assert table.loc["naive", "return_ratio"] == 0.5 and table.loc["naive", "planner_calls"] == 0.1
    with pytest.raises(DataError, match="seeds that"):
        write_results.unperturbed(tmp_path, [3])


def test_fallbacks_are_counted_where_a_perturbation_is_hardest() -> None:
    worlds = {("none", 0.0): 0.1, ("push", 0.1): 0.5, ("push", 1.0): 0.05}
    worlds |= {("friction", 0.4): 0.2, ("friction", 1.5): 0.05, ("mass", 1.6): 0.11}
    table = pd.DataFrame(
        {"task": "a", "mode": mode, "kind": kind, "strength": strength, "fallbacks": fallbacks}
        | {"return_ratio": ratio, "return_ratio_low": 0.9, "return_ratio_high": 1.1, "planner_calls": 0.3}
        | {"episodes": 4.0}
        for (kind, strength), fallbacks in worlds.items()
        for mode, ratio in (("chosen", 1.0), ("distilled_refined", 1.0 + strength - 0.5))
    )
    text = write_results.perturbed(table)
    assert "in 2 of 3 pairs of a task and a kind, at least twice as often in 1." in text
    assert "| 1 of 1 | 30.0 % (30.0) | 20.0 % (10.0) |" in text, "friction 0.4"
    assert "| 0 of 1 | 30.0 % (30.0) | 11.0 % (10.0) |" in text, "mass 1.6"
