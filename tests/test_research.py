"""The programs in `research/` start: their help, and what they say of settings that cannot be."""

import runpy
import sys
from pathlib import Path

import pytest

RESEARCH = Path(__file__).parents[1] / "research"
PROGRAMS = [path for path in sorted(RESEARCH.glob("*.py")) if "__main__" in path.read_text()]


def start(path: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.syspath_prepend(RESEARCH)
    monkeypatch.setattr(sys, "argv", [str(path), *arguments])
    runpy.run_path(str(path), run_name="__main__")


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.stem)
def test_help(path: Path, monkeypatch, capsys) -> None:
    start(path, monkeypatch, "--help")
    assert capsys.readouterr().out.startswith("python ")


@pytest.mark.parametrize(
    ("program", "arguments", "line"),
    [
        ("rules", "correctors=c eval_seed=1", "unknown setting 'eval_seed'; did you mean evaluation.seed?"),
        (
            "rules",
            "correctors=c evaluation.seed=10019",
            "evaluation.seed=10019: evaluation seeds overlap the calibration seeds",
        ),
        (
            "paper",
            "data=d calibration_seed=20019",
            "evaluation.seed=20000: evaluation seeds overlap the calibration seeds",
        ),
        ("paper", "data=d updates=0", "updates=0: must be at least 1"),
        ("precision", "evaluation.episodes=1", "evaluation.episodes=1: a single one has no interval"),
    ],
)
def test_wrong_settings_end_before_anything_is_opened(program, arguments, line, monkeypatch, capsys) -> None:
    with pytest.raises(SystemExit):
        start(RESEARCH / f"{program}.py", monkeypatch, "task=a", "checkpoint=b", *arguments.split())
    assert capsys.readouterr().err == f"error: {line}\n"
