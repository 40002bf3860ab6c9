"""Mutation testing: changes of the code that a user would meet, and whether a test notices each of them.

    python tests/mutants.py                    all of them
    python tests/mutants.py refine.py metrics  those in files with such names

Each mutant in `mutants.toml` replaces one text of the package. It is made in a copy of the repository, one
at a time, and the tests that the list names for its file run there. What becomes of it is written to
`docs/mutation.md`, which keeps what it says of mutants that are not run. All of them take half an hour.
"""

import argparse
import multiprocessing
import os
import re
import shutil
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple, TextIO

import pandas  # noqa: F401  what forks share
import pytest
import scipy.stats  # noqa: F401
import torch  # noqa: F401

ROOT = Path(__file__).parents[1]
COPIED = ("tdmpc2", "tests", "research", "scripts", "pyproject.toml")  # what tests need
PASSED, FAILED = 0, 1  # exit codes of pytest
NOBODY, TIMEOUT, NOT_RUN = "no test", "a timeout", "not run"  # where no test noticed a mutant
SLOWER = 5  # times as long as unchanged, and a minute, until a mutant's tests are stopped


class Mutant(NamedTuple):
    """A change that a user would meet."""

    file: str
    old: str  # is in the file exactly once
    new: str
    why: str  # what the user would meet
    tests: Sequence[str]  # pytest's arguments

    def apply(self, text: str) -> str:
        """The file's text with the change; ValueError where the change does not fit it."""
        if text.count(self.old) != 1:
            raise ValueError(f"{self.file} has this {text.count(self.old)} times, not once: {self.old}")
        changed = text.replace(self.old, self.new)
        compile(changed, self.file, "exec")
        return changed


class Result(NamedTuple):
    mutant: Mutant
    by: str  # the first test that failed, or one of NOBODY, TIMEOUT and NOT_RUN


def read_mutants() -> list[Mutant]:
    """The mutants of the list, in its order."""
    files = tomllib.loads(Path(__file__).with_suffix(".toml").read_text())
    tests = files.pop("tests")
    return [Mutant(file, **entry, tests=tests[file]) for file, entries in files.items() for entry in entries]


def run_tests(folder: Path, arguments: Sequence[str], timeout: float | None = None) -> tuple[int | None, str]:
    """Run pytest in a copy of the repository, up to the first failure: its exit code and output.

    The code is None after a timeout. A fork has the large libraries already, which saves half of the time.
    """
    with tempfile.TemporaryFile("w+") as output:
        process = multiprocessing.get_context("fork").Process(
            target=_pytest, args=(folder, arguments, output)
        )
        process.start()
        process.join(timeout)
        code = process.exitcode
        process.kill()
        process.join()
        output.seek(0)
        return code, output.read()


def _pytest(folder: Path, arguments: Sequence[str], output: TextIO) -> None:
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    sys.dont_write_bytecode = True  # two changes within a second would look alike
    os.environ.update(PYTHONPATH=str(folder), PYTHONDONTWRITEBYTECODE="1", OMP_NUM_THREADS="1")
    for stream in (1, 2):
        os.dup2(output.fileno(), stream)
    with redirect_stdout(output), redirect_stderr(output):
        code = pytest.main(["-x", "-q", "-p", "no:cacheprovider", *arguments])
    output.flush()
    sys.exit(code)


def run(mutants: Sequence[Mutant]) -> Iterator[Result]:
    """What became of each mutant, one after another.

    Raises:
        RuntimeError: tests fail without any change, or did not run.
        ValueError: a mutant does not fit its file.
    """
    with tempfile.TemporaryDirectory(prefix="tdmpc2-mutants-") as name:
        folder = Path(name)
        for part in COPIED:
            if (ROOT / part).is_dir():
                shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(ROOT / part, folder)
        seconds: dict[tuple[str, ...], float] = {}  # that tests take when nothing is changed
        for mutant in mutants:
            tests = tuple(mutant.tests)
            if tests not in seconds:
                began = time.monotonic()
                code, output = run_tests(folder, tests)
                seconds[tests] = time.monotonic() - began
                if code != PASSED:
                    raise RuntimeError(f"tests fail without any change: {output[-2000:]}")
            path = folder / mutant.file
            original = path.read_text()
            path.write_text(mutant.apply(original))
            try:
                yield outcome_of(mutant, folder, SLOWER * seconds[tests] + 60)
            finally:
                path.write_text(original)


def outcome_of(mutant: Mutant, folder: Path, timeout: float) -> Result:
    """Run the tests of a mutant that is in place in `folder`."""
    code, output = run_tests(folder, mutant.tests, timeout)
    if code is None:
        return Result(mutant, TIMEOUT)
    if code == PASSED:
        return Result(mutant, NOBODY)
    failed = re.search(r"^(?:FAILED|ERROR) \S+::(\w+)", output, re.MULTILINE)
    if code != FAILED or failed is None:
        raise RuntimeError(f"{mutant.file}, {mutant.why}: no test ran: {output[-2000:]}")
    return Result(mutant, failed[1])


def score(results: Sequence[Result]) -> str:
    """How many mutants were noticed, in words."""
    noticed = sum(r.by not in (NOBODY, NOT_RUN) for r in results)
    return f"{noticed} of {len(results)} ({100 * noticed // len(results)} %)"


def to_page(results: Sequence[Result]) -> str:
    """The results in Markdown, for `docs/mutation.md`."""
    lines = [
        "# Mutation testing",
        "",
        f"Each line is a change of the code that a user would meet. Tests notice {score(results)} of them.",
        "",
        "Written by `python tests/mutants.py`, which makes one change after another in a copy of the",
        "repository and runs the tests of the changed file. `tests/mutants.toml` has the changes themselves.",
        f"A test that runs for more than {SLOWER} times its usual time counts as a notice.",
    ]
    for file in dict.fromkeys(r.mutant.file for r in results):
        own = [r for r in results if r.mutant.file == file]
        lines += ["", f"## `{file}`: {score(own)}", "", "| change | noticed by |", "| --- | --- |"]
        lines += [f"| {r.mutant.why} | {r.by} |" for r in own]
    return "\n".join(lines) + "\n"


def from_page(page: str, mutants: Sequence[Mutant]) -> list[Result]:
    """What a page says of mutants; they are known by their files and what a user would meet."""
    known, file = {}, ""
    for line in page.splitlines():
        if heading := re.match(r"## `(.+)`", line):
            file = heading[1]
        elif row := re.fullmatch(r"\| (.+) \| (.+) \|", line):
            known[file, row[1]] = row[2]
    return [Result(mutant, known.get((mutant.file, mutant.why), NOT_RUN)) for mutant in mutants]


def main() -> int:
    """Run the mutants that the command line names; returns 1 where one survives."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("names", nargs="*", help="parts of file names")
    names = parser.parse_args().names
    mutants, path = read_mutants(), ROOT / "docs" / "mutation.md"
    results = from_page(path.read_text() if path.exists() else "", mutants)
    chosen = [m for m in mutants if not names or any(name in m.file for name in names)]
    if not chosen:
        parser.error(f"no mutant is in a file with such a name: {' '.join(names)}")
    for result in run(chosen):
        results[mutants.index(result.mutant)] = result
        path.write_text(to_page(results))
        print(f"{result.mutant.file}: {result.mutant.why} Noticed by {result.by}", flush=True)
    results = [r for r in results if r.mutant in chosen]
    print(f"noticed: {score(results)}")
    return int(any(r.by == NOBODY for r in results))


if __name__ == "__main__":
    sys.exit(main())
