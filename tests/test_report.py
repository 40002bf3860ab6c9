"""The report is one file that holds every mode, escapes what it is given, and copes with poor data."""

import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from tdmpc2.evaluation.metrics import summarise
from tdmpc2.evaluation.report import headline, write_report

MODES = {"baseline": 1, "naive_3": 3, "two_tower_6": 6, "prior": 1}


def results(seeds: int, scale: float = 100.0) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    rng = np.random.default_rng(0)
    episodes, steps, latency = [], [], []
    for mode, horizon in MODES.items():
        for seed in range(seeds):
            calls = 0 if mode == "prior" else -(-12 // horizon)
            episodes.append((mode, seed, scale * rng.uniform(0.9, 1), 12, False, calls, 0))
            for t in range(12):
                k = t % horizon
                kind = "prior" if mode == "prior" else "planned" if k == 0 else "corrected"
                steps.append((mode, seed, t, kind, k, np.nan if k == 0 else 0.1 * k, 0.0, 1.0, np.nan))
        latency += [(mode, t, "planned", rng.uniform(1, 2)) for t in range(20)]
    names = ["mode", "seed", "return", "length", "terminated", "planner_calls", "fallbacks"]
    columns = ["mode", "seed", "t", "kind", "k", "mismatch", "delta_a", "reward", "teacher_distance"]
    return (
        pd.DataFrame(episodes, columns=names),
        pd.DataFrame(steps, columns=columns),
        pd.DataFrame(latency, columns=["mode", "t", "kind", "act_ms"]),
    )


@pytest.mark.parametrize(("seeds", "scale"), [(5, 100.0), (1, 100.0), (3, 0.0)])
def test_report_is_complete(tmp_path: Path, seeds: int, scale: float) -> None:
    episodes, steps, latency = results(seeds, scale)
    summary = summarise(episodes, steps, latency)
    meta = {"task": "<b>walker</b> & co", "seeds": "0 to 4", "chosen": "two_tower_6", "commit": "abc123"}
    html = write_report(tmp_path, episodes, steps, latency, summary, meta).read_text()
    assert all(mode in html for mode in MODES) and "abc123" in html
    assert html.count("<figure>") == html.count("<svg") == 7
    assert "<b>walker</b>" not in html and "&lt;b&gt;walker" in html
    assert not re.search(r"(src|href)=[\"']?(https?:)?//", html), "nothing is fetched from elsewhere"
    assert not re.search(r"\bnan\b", re.sub(r"<svg.*?</svg>", "", html, flags=re.DOTALL)), "unreadable"


def test_headline_follows_the_numbers() -> None:
    episodes, steps, latency = results(5)
    summary = summarise(episodes, steps, latency)
    row = summary.set_index("mode").loc["two_tower_6"]
    assert f"{row.return_ratio:.1%}" in headline(summary, {"chosen": "two_tower_6"})
    assert "replans at every step" in headline(summary, {"chosen": "baseline"})
