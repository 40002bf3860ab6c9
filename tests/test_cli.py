"""How scripts start: settings in, a typed config out, one line for every mistake."""

import os
import re
import subprocess
import sys
from dataclasses import FrozenInstanceError, dataclass
from enum import Enum
from pathlib import Path

import pytest

from tdmpc2 import cli
from tdmpc2.config import PlannerConfig
from tdmpc2.errors import ConfigError
from tdmpc2.files import read_json

ROOT = Path(__file__).parents[1]


class Colour(Enum):
    red = 1
    blue = 2


@dataclass(frozen=True)
class Base:
    """What several scripts share.

    More words, which --help leaves out.
    """

    steps: int = 10  # of the agent
    rate: float = 3e-4


@dataclass(frozen=True, kw_only=True)
class Config(Base):
    """What this script alone has."""

    task: str
    seed: int | None = None  # None: a random one
    sizes: tuple[int, ...] = (1, 2)
    resume: bool = False
    note: str = ""  # free text
    colour: Colour = Colour.red


@pytest.fixture
def start(monkeypatch, tmp_path):
    """Start a script in an empty folder and return the configs that its main received."""

    def start(*arguments, config=Config, main=None):
        received = []
        monkeypatch.setattr(sys, "argv", ["scripts/demo.py", *arguments])
        cli.run(config, main or received.append)
        return received

    monkeypatch.chdir(tmp_path)
    return start


@pytest.fixture
def fails(start, capsys):
    """Start a script that must fail with one line on stderr; return that line.

    Before it, where a run of a sweep fails, Hydra prints which one.
    """

    def fails(*arguments, status=1, **how):
        with pytest.raises(SystemExit) as e:
            start(*arguments, **how)
        assert e.value.code == status
        out, err = capsys.readouterr()
        assert out == ""
        *before, line = err.splitlines()
        assert all(w.startswith("Error executing job with overrides: [") for w in before)
        assert not before or arguments[0] == "--multirun"
        return line

    return fails


def test_main_receives_the_dataclass_itself(start):
    arguments = ["task=my_package:MyEnv-v0", "rate=1e-2", "sizes=[3,4]", "resume=true", "seed=7"]
    (config,) = start(*arguments, "colour=blue", "note=a b")
    assert config == Config(
        task="my_package:MyEnv-v0",
        rate=0.01,
        sizes=(3, 4),
        resume=True,
        seed=7,
        colour=Colour.blue,
        note="a b",
    )
    assert type(config) is Config and type(config.sizes) is tuple
    assert hash(config)
    with pytest.raises(FrozenInstanceError):
        config.steps = 3


def test_defaults_and_null(start):
    assert start("task=a") == [Config(task="a")]
    assert start("task=a", "seed=null") == [Config(task="a")]


def test_parts_of_the_package_can_be_inherited_from(start):
    @dataclass(frozen=True, kw_only=True)
    class Planning(PlannerConfig):
        task: str

    (config,) = start("task=a", "num_samples=256", config=Planning)
    assert isinstance(config, PlannerConfig)
    assert (config.num_samples, config.num_elites) == (256, PlannerConfig().num_elites)


def test_multirun_visits_every_combination(start):
    configs = start("--multirun", "task=a,b", "seed=1,2")
    assert [(c.task, c.seed) for c in configs] == [("a", 1), ("a", 2), ("b", 1), ("b", 2)]
    assert all(type(c) is Config for c in configs)


def test_nothing_is_littered_and_the_folder_stays(start, tmp_path):
    folders = []
    start("task=a", main=lambda _: folders.append(os.getcwd()))
    start("--multirun", "task=a,b", main=lambda _: folders.append(os.getcwd()))
    assert folders == 3 * [str(tmp_path)]
    assert list(tmp_path.iterdir()) == []


def test_unknown_setting_names_the_nearest(fails):
    expected = "error: unknown setting 'tsk'; did you mean 'task'? `--help` lists all"
    assert fails("tsk=walker-walk") == expected
    assert fails("--multirun", "tsk=a,b") == expected
    assert fails("qqqqq=1") == "error: unknown setting 'qqqqq'; `--help` lists all"
    assert "unknown setting '+extra'" in fails("task=a", "+extra=1")


def test_required_settings(fails):
    expected = "error: task=... is required; `--help` lists all settings"
    assert fails("seed=1") == expected
    assert fails("--multirun", "seed=1,2") == expected


@pytest.mark.parametrize(
    ("argument", "line"),
    [
        ("steps=many", "error: steps: Value 'many' of type 'str' could not be converted to Integer"),
        ("steps=1.5", "error: steps: Value '1.5' of type 'float' could not be converted to Integer"),
        ("steps=null", "error: steps: field 'steps' is not Optional"),
        ("resume=perhaps", "error: resume: Value 'perhaps' is not a valid bool"),
        ("colour=green", "error: colour: Invalid value 'green', expected one of [red, blue]"),
        ("sizes=[1,x]", "error: sizes"),
        ("seed=1,2", "error: Ambiguous value for argument 'seed=1,2'"),
        ("task=a(", "error: "),
        ("walker-walk", "error: 'walker-walk' is no setting: write key=value"),
        ("--task=a", "error: --task=a: settings are written without dashes"),
    ],
)
def test_wrong_values_are_one_line(fails, argument, line):
    assert fails("task=a", argument).startswith(line)


def raiser(error):
    def main(_):
        raise error

    return main


def test_errors_of_main_are_one_line(fails):
    main = raiser(ConfigError("the sky\n  is falling"))
    assert fails("task=a", main=main) == "error: the sky is falling"
    assert fails("--multirun", "task=a,b", main=main) == "error: the sky is falling"


def test_a_failed_run_does_not_stop_the_sweep(start, capsys):
    seen = []

    def main(config):
        seen.append(config.task)
        if config.task == "b":
            raise ConfigError("b is bad")

    with pytest.raises(SystemExit):
        start("--multirun", "task=a,b,c", main=main)
    assert seen == ["a", "b", "c"]
    expected = ["Error executing job with overrides: ['task=b']", "error: b is bad"]
    assert capsys.readouterr().err.splitlines() == expected


def test_other_errors_keep_their_traceback(start):
    with pytest.raises(ZeroDivisionError):
        start("task=a", main=raiser(ZeroDivisionError()))


def test_interrupt(fails):
    line = fails("task=a", main=raiser(KeyboardInterrupt()), status=130)
    assert line == "interrupted: what was written so far stays"


def test_help(start, capsys):
    assert start("--help") == []
    out = capsys.readouterr().out
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert lines[0] == "python demo.py key=value ..."
    assert lines.index("What this script alone has.") < lines.index("What several scripts share.")
    for line in (
        "task=... (required)",
        "seed=null None: a random one",
        "sizes=[1, 2]",
        'note="" free text',
        "colour=red",
        "resume=false",
        "steps=10 of the agent",
        "rate=0.0003",
    ):
        assert lines.count(line) == 1, line
    assert "More words" not in out


def test_save_config(tmp_path):
    cli.save_config(tmp_path / "config.json", Base(steps=3))
    assert read_json(tmp_path / "config.json") == {"steps": 3, "rate": 3e-4}


def test_provenance(monkeypatch):
    monkeypatch.setattr(sys, "argv", [str(Path("scripts/demo.py").absolute()), "task=a", "note=a b"])
    found = cli.provenance()
    assert found["command"] == "python scripts/demo.py task=a 'note=a b'"
    assert set(found) == {"command", "commit", "machine", "versions", "date"}
    assert all(found.values())
    assert "cores, 1 threads" in found["machine"]
    assert "MuJoCo 3." in found["versions"]


SCRIPT = """
import signal, os
from dataclasses import dataclass
from tdmpc2 import cli

@dataclass(frozen=True)
class Config:
    '''Of a script in a file.'''

    task: str  # what to do

def main(config: Config) -> None:
    if config.task == "interrupt":
        os.kill(os.getpid(), signal.SIGINT)
    print("did", config.task, flush=True)

if __name__ == "__main__":
    cli.run(Config, main)
"""


def test_a_real_script(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)

    def script(*arguments):
        result = subprocess.run(
            [sys.executable, "script.py", *arguments],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"},
            capture_output=True,
            text=True,
            timeout=60,
        )
        return result.returncode, result.stdout, result.stderr

    assert script("-m", "task=a,b") == (0, "did a\ndid b\n", "")
    assert script("task=interrupt") == (130, "", "interrupted: what was written so far stays\n")
    status, out, _ = script("--help")
    assert status == 0
    assert re.search(r"task=\.\.\.  \(required\) +what to do", out)
    assert os.listdir(tmp_path) == ["script.py"]
