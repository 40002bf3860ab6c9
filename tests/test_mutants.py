"""The list of mutants fits the code, and the page in docs is of that list."""

from pathlib import Path

import mutants
import pytest

ROOT = Path(__file__).parents[1]
MUTANTS = mutants.read_mutants()


def test_every_mutant_fits_its_file() -> None:
    for mutant in MUTANTS:
        assert mutant.apply((ROOT / mutant.file).read_text()) != (ROOT / mutant.file).read_text()
    assert len({mutant[:3] for mutant in MUTANTS}) == len(MUTANTS) >= 60
    with pytest.raises(ValueError, match="0 times"):
        MUTANTS[0].apply("nothing of it\n")


def test_outcomes_are_those_of_the_tests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small package with one test, which notices one change and not another."""
    for folder in ("package", "tests"):
        (tmp_path / folder).mkdir()
    (tmp_path / "package/code.py").write_text("def double(x):\n    return 2 * x\n")
    test = "from package.code import double\n\ndef test_double():\n    assert double(2) == 4\n"
    (tmp_path / "tests/test_code.py").write_text(test)
    monkeypatch.setattr(mutants, "ROOT", tmp_path)
    monkeypatch.setattr(mutants, "COPIED", ("package", "tests"))

    def mutant(new: str) -> mutants.Mutant:
        return mutants.Mutant("package/code.py", "2 * x", new, f"{new}!", ["tests"])

    results = list(mutants.run([mutant("3 * x"), mutant("x * 2")]))
    assert [r.by for r in results] == ["test_double", mutants.NOBODY]
    assert mutants.score(results) == "1 of 2 (50 %)"
    page = mutants.to_page(results)
    assert "| 3 * x! | test_double |\n| x * 2! | no test |" in page
    another = mutants.Result(mutant("4 * x"), mutants.NOT_RUN)
    assert mutants.from_page(page, [r.mutant for r in [another, *results]]) == [another, *results]
    assert (tmp_path / "package/code.py").read_text().endswith("return 2 * x\n"), "changed in the copy alone"
    monkeypatch.setattr(mutants, "run_tests", lambda *_: (None, ""))
    assert mutants.outcome_of(mutant("while"), tmp_path, 1.0).by == mutants.TIMEOUT
    monkeypatch.setattr(mutants, "run_tests", lambda *_: (2, "SyntaxError"))
    with pytest.raises(RuntimeError, match="no test ran"):
        mutants.outcome_of(mutant("while"), tmp_path, 1.0)


def test_the_page_is_of_this_list() -> None:
    """Every mutant was run, and tests noticed it."""
    page = (ROOT / "docs/mutation.md").read_text()
    results = mutants.from_page(page, MUTANTS)
    assert page == mutants.to_page(results)
    assert not {r.by for r in results} & {mutants.NOT_RUN, mutants.NOBODY}, "run tests/mutants.py"
