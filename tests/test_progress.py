"""What work shows: bars that fit a terminal, lines elsewhere, and the last values at the end."""

import io
import time

import pytest
from rich.console import Console

from tdmpc2.progress import SILENT, Progress, Table


def terminal() -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=80, _environ={"TERM": "xterm"})


def shown(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_elsewhere_lines_come_at_intervals_also_while_nothing_advances() -> None:
    console = Console(file=io.StringIO(), width=20)
    with (
        Progress(console, interval=0.02) as progress,
        progress.add("training", 20_000, unit="steps") as stage,
    ):
        assert shown(console) == "training: 0 of 20,000 steps\n"
        stage.at(5000)
        stage.note("return 1.5")
        deadline = time.monotonic() + 10
        while shown(console).count("training: 5,000 of 20,000 steps, return 1.5") < 3:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        stage.at(20_000)
        stage.note("return 2.5")
        progress.print("evaluation [bold] 3")
    lines = shown(console).splitlines()
    assert lines[-2] == "evaluation [bold] 3"
    assert lines[-1].startswith("training: 20,000 of 20,000 steps, return 2.5, ")
    assert lines[-1].endswith("in 0:00:00")
    ended = shown(console)
    time.sleep(0.1)
    assert shown(console) == ended, "a line after the end"


def test_everything_that_matters_fits_a_terminal_of_80_columns() -> None:
    console = terminal()
    with Progress(console) as progress:
        stage = progress.add("training", 1_000_000, done=123_000)
        for done in range(123_000, 123_456):
            stage.at(done + 1)
        stage.note("return 912.3, evaluation 912.3")
        progress._bars.refresh()
        text = shown(console)
    for part in ("training", "123,456/1,000,000", "return 912.3, evaluation 912.3", "/s "):
        assert part in text, part
    assert "…" not in text


@pytest.mark.parametrize("console", [terminal(), Console(file=io.StringIO(), width=80)])
def test_what_ends_early_leaves_its_last_values(console: Console) -> None:
    with pytest.raises(KeyboardInterrupt), Progress(console) as progress:
        progress.add("collecting", unit="steps").at(40, total=90)
        with progress.add("compiling") as stage:
            stage.end("compiled")
        raise KeyboardInterrupt
    assert shown(console).count("compiled\n") == 1
    assert "collecting: 40 of 90 steps, in 0:00:00\n" in shown(console)


def test_a_table_shows_its_text_as_it_is() -> None:
    console = Console(file=io.StringIO(), width=20)
    rows = [["push 0.3", "naive_3", "0.98 [0.9, 1.1]"], ["[bold]", "a_mode_of_many_letters", "1"]]
    Progress(console).table(Table(["world", "mode", "ratio [95 %]"], rows, "of [walker]", words=2))
    title, columns, _, *lines = shown(console).splitlines()
    assert title.strip() == "of [walker]" and columns.split() == ["world", "mode", "ratio", "[95", "%]"]
    assert [line.split() for line in lines] == [" ".join(row).split() for row in rows]
    assert len(set(map(len, map(str.rstrip, lines)))) == 1, "numbers end in one column, words begin in one"
    Progress(console).table(Table(["mode", "return"], []))
    SILENT.table(Table(["mode"], [["unseen"]]))
    assert "unseen" not in shown(console)


def test_silence() -> None:
    with SILENT as progress, progress.add("training", 10) as stage:
        stage.advance()
        progress.print("unheard")
