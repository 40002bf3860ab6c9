"""How scripts start: settings in, a typed config out, one line for every mistake."""

import os
import re
import signal
import subprocess
import sys
import threading
from dataclasses import FrozenInstanceError, astuple, dataclass, field, make_dataclass
from enum import Enum
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra._internal.core_plugins.basic_launcher import BasicLauncherConf
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, QuotedString
from hypothesis import assume, given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from tdmpc2 import cli
from tdmpc2.config import PlannerConfig
from tdmpc2.errors import ConfigError, Stopped
from tdmpc2.provenance import provenance

ROOT = Path(__file__).parents[1]


class Colour(Enum):
    red = 1
    blue = 2


@dataclass(frozen=True)
class Part:
    """What several scripts share.

    More words, which --help leaves out.
    """

    steps: int = 10  # of the agent
    name: str = ""
    may: str | None = None
    sizes: tuple[int, ...] = (1, 2)


@dataclass(frozen=True)
class LongPart(Part):
    """A part of many steps."""

    rate: float = 3e-4  # a step


@dataclass(frozen=True, kw_only=True)
class Config:
    """What this script alone has."""

    task: str
    steps: int = 3
    seed: int | None = None  # None: a random one
    rate: float = 3e-4
    sizes: tuple[int, ...] = (1, 2)
    resume: bool = False
    note: str = ""  # free text
    colour: Colour = Colour.red
    part: Part = field(default_factory=Part)
    long: LongPart = field(default_factory=lambda: LongPart(steps=1000))
    planner: PlannerConfig = field(default_factory=PlannerConfig)


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
    """Start a script that must fail with one line on stderr; return that line."""

    def fails(*arguments, status=1, **how):
        with pytest.raises(SystemExit) as e:
            start(*arguments, **how)
        assert e.value.code == status
        out, err = capsys.readouterr()
        assert out == ""
        (line,) = err.splitlines()
        return line

    return fails


def test_main_receives_the_dataclass_itself(start):
    arguments = ["task=walker-walk", "rate=1e-2", "sizes=[3,4]", "resume=true", "seed=7"]
    (config,) = start(*arguments, "colour=blue", "note=a b")
    assert config == Config(
        task="walker-walk",
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


def test_settings_of_parts(start, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    arguments = ["part.steps=5", "part.name=~/José (1),v=2.pt", "part.may=null", "part.sizes=[3,4]"]
    (config,) = start("task=a", *arguments, "planner.num_samples=256")
    part = Part(steps=5, name="/home/me/José (1),v=2.pt", sizes=(3, 4))
    assert config == Config(task="a", part=part, planner=PlannerConfig(num_samples=256))
    assert type(config.part) is Part and type(config.part.sizes) is tuple
    assert config.long == LongPart(steps=1000), "a default of the whole, not of the part's class"
    (config,) = start("task=a", "long.rate=1", "part.may='null'", "part.name='null'")
    assert config.long == LongPart(steps=1000, rate=1.0)
    assert (config.part.may, config.part.name) == ("null", "null")


def test_a_sweep_over_a_part(start, capsys):
    configs = start("--multirun", "task=a", "planner.num_samples=128,256", "part.name='x,y',z")
    found = [(c.planner.num_samples, c.part.name) for c in configs]
    assert found == [(128, "x,y"), (128, "z"), (256, "x,y"), (256, "z")]
    with pytest.raises(SystemExit):
        start("-m", "task=a", "planner.num_samples=128,256", main=raiser(ConfigError("no")))
    assert capsys.readouterr().err.splitlines()[0] == "error: planner.num_samples=128: no"


def test_multirun_visits_every_combination(start):
    configs = start("task=a,b", "--multirun", "seed=1,2")
    assert [(c.task, c.seed) for c in configs] == [("a", 1), ("a", 2), ("b", 1), ("b", 2)]
    assert all(type(c) is Config for c in configs)


def test_nothing_is_littered_and_the_folder_stays(start, tmp_path):
    folders = []
    start("task=a", main=lambda _: folders.append(os.getcwd()))
    start("--multirun", "task=a,b", main=lambda _: folders.append(os.getcwd()))
    assert folders == 3 * [str(tmp_path)]
    assert list(tmp_path.iterdir()) == []


def test_unknown_setting_names_the_nearest(fails):
    expected = "error: unknown setting 'tsk'; did you mean task?"
    assert fails("tsk=walker-walk") == expected
    assert fails("--multirun", "tsk=a,b") == expected
    assert fails("qqqqq=1") == "error: unknown setting 'qqqqq'; `--help` lists all"
    assert "unknown setting '+extra'" in fails("task=a", "+extra=1")


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("num_samples", "planner.num_samples"),
        ("planer.num_samples", "planner.num_samples"),
        ("part.num_samples", "planner.num_samples"),
        ("num_sampels", "planner.num_samples"),
        ("planner.num_sampels", "planner.num_samples"),
        ("min_stdd", "planner.min_std"),
        ("lon_steps", "long.steps"),
        ("planner.note", "note"),
        ("name", "part.name or long.name"),
        ("long", "long.steps or long.name or long.may"),
    ],
)
def test_a_setting_of_another_part_is_named(fails, typed, meant):
    assert fails("task=a", f"{typed}=3") == f"error: unknown setting {typed!r}; did you mean {meant}?"


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
        ("seed=1,2", "error: seed=1,2: several values make a sweep, with --multirun"),
        ("seed=range(3)", "error: seed=range(3): several values make a sweep, with --multirun"),
        ("seed=1é", "error: seed=1é: this value cannot be read"),
        ("sizes=[1,2", "error: sizes=[1,2: this value cannot be read"),
        ("sizes=3", "error: sizes=3: a list has brackets, as in sizes=[3]"),
        ("seed=None", "error: seed: Value 'None' of type 'str' could not be converted to Integer"),
        ("seed=9223372036854775808", "error: seed=9223372036854775808: must be of type int"),
        ("sizes=[1,-9223372036854775808]", "error: sizes=(1, -9223372036854775808): must be of type tuple"),
        ("rate=nan", "error: rate=nan: must be of type float"),
        ("rate=", "error: rate: Value '' of type 'str' could not be converted to Float"),
        ("walker-walk", "error: 'walker-walk' is not key=value: write settings without spaces"),
        (
            "part.steps=many",
            "error: part.steps: Value 'many' of type 'str' could not be converted to Integer",
        ),
        ("part.steps=null", "error: part.steps: field 'part.steps' is not Optional"),
        ("part.sizes=3", "error: part.sizes=3: a list has brackets"),
        ("part.sizes=[1,2", "error: part.sizes=[1,2: this value cannot be read"),
        ("part.steps=1,2", "error: part.steps=1,2: several values make a sweep"),
        ("long.rate=nan", "error: long.rate=nan: must be of type float"),
        ("planner.horizon=0", "error: planner.horizon=0: must be from 1 to 100"),
        ("planner.num_elites=513", "error: planner.num_elites=513: must be from 1 to num_samples, 512"),
        ("--num-samples=3", "error: --num-samples=3: settings are written without dashes"),
        ("--planner.num_samples=3", "error: --planner.num_samples=3: settings are written without dashes"),
        ("--task=a", "error: --task=a: settings are written without dashes"),
    ],
)
def test_wrong_values_are_one_line(fails, argument, line):
    assert fails("task=a", argument).startswith(line)


def raiser(error):
    def main(_):
        raise error

    return main


OUT_OF_MEMORY = "error: out of memory: use a smaller batch, buffer or model, or fewer environments"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ConfigError("the sky\n  is falling"), "error: the sky is falling"),
        (FileExistsError(17, "File exists", "/a/b"), "error: /a/b: File exists"),
        (OSError(28, "No space left on device", "/a", None, "/b"), "error: /a: No space left on device"),
        (OSError("cannot find\nan empty port"), "error: cannot find an empty port"),
        (MemoryError(), OUT_OF_MEMORY),
        (torch.OutOfMemoryError("CUDA out of memory."), OUT_OF_MEMORY),
    ],
)
def test_errors_of_main_are_one_line(fails, error, line):
    assert fails("task=a", main=raiser(error)) == line


def test_more_memory_than_there_is(fails):
    assert fails("task=a", main=lambda _: torch.empty(2**60)) == OUT_OF_MEMORY
    assert fails("task=a", main=lambda _: np.empty(2**58)) == OUT_OF_MEMORY


def test_a_failed_run_does_not_stop_the_sweep(start, capsys):
    seen = []

    def main(config):
        seen.append(config.task)
        if config.task == "a":
            raise ConfigError("a is bad")
        if config.rate == 2:
            raise FileNotFoundError(2, "No such file", "b.pt")

    with pytest.raises(SystemExit) as e:
        start("--multirun", "task=a,b", "seed=1", "rate=1,2", main=main)
    assert e.value.code == 1
    assert seen == ["a", "a", "b", "b"]
    assert capsys.readouterr().err.splitlines() == [
        "error: task=a rate=1.0: a is bad",
        "error: task=a rate=2.0: a is bad",
        "error: task=b rate=2.0: b.pt: No such file",
        "error: 3 of 4 runs failed",
    ]


def test_a_fault_of_ours_has_its_traceback_and_does_not_stop_the_sweep(start, capsys):
    def main(config):
        1 / (config.seed - 1)

    with pytest.raises(SystemExit):
        start("--multirun", "task=a", "seed=1,2", main=main)
    first, *_, cause, which, last = capsys.readouterr().err.splitlines()
    assert first.startswith("Traceback") and cause.startswith("ZeroDivisionError")
    assert (which, last) == ("error: seed=1: see above", "error: 1 of 2 runs failed")


def test_values_that_cannot_be_are_found_before_the_sweep_begins(fails):
    seen = []
    line = fails("--multirun", "task=a", "rate=1,nan", main=seen.append)
    assert line == "error: rate=nan: must be of type float"
    assert not seen


def test_other_launchers_run_the_sweep_themselves(start, capsys):
    ConfigStore.instance().store(group="hydra/launcher", name="elsewhere", node=BasicLauncherConf)
    arguments = ("--multirun", "task=a,b", "hydra/launcher=elsewhere")
    assert [c.task for c in start(*arguments)] == ["a", "b"]
    with pytest.raises(SystemExit) as e:
        start(*arguments, main=raiser(ConfigError("the sky is falling")))
    assert e.value.code == 1
    assert capsys.readouterr().err.splitlines()[-1] == "error: the sky is falling"


NASTY = [
    *("José", "seed=1", "model (1)", "a,b", "it's", "#3", "R&D", "!", "{", "}", "[", "]", "(", ":", "%", "@"),
    *(
        'say "hi"',
        "a\\",
        "\\'",
        "${task}",
        "\\${task}",
        "$(ls)",
        "a~",
        "1e3",
        "007",
        "true",
        "null",
        "a\nb",
        " a ",
    ),
    *("/with space/", "'half", '"', "*", "a;b", "-1", "", "日本", "\udc80"),
]


def test_text_is_taken_as_it_is(start):
    names = [f"text_{i}" for i in range(len(NASTY))]
    texts = make_dataclass("Texts", [(name, str, "default") for name in names], frozen=True)
    (config,) = start(*(f"{name}={text}" for name, text in zip(names, NASTY, strict=True)), config=texts)
    assert list(astuple(config)) == NASTY
    own = ("models/José (1)", "${task}", "\\'", "seed=1")
    assert [c.note for c in start("--multirun", "task=a", f"note={','.join(own)}")] == list(own)


def as_hydra_reads(config, argument: str, sweep: bool = False) -> list[str | None]:
    """The values of a text setting, by Hydra's grammar and OmegaConf's interpolation."""
    value = OverridesParser.create().parse_override(cli._for_hydra(config, argument, sweep)).value()
    values = value.list if isinstance(value, ChoiceSweep) else [value]
    values = [v.text if isinstance(v, QuotedString) else v for v in values]
    name = argument.partition("=")[0]
    return [OmegaConf.create({name: v})[name] for v in values]


@given(st.text(alphabet=st.characters(exclude_characters="\0", exclude_categories=())))
def test_any_text_is_read_as_it_is(text):
    """But for the home, quotes around it, and OmegaConf's word for a value that is missing."""
    assume(not text.startswith("~") and text[:1] + text[1:][-1:] not in ("''", '""') and text != "???")
    assert as_hydra_reads(Config, f"note={text}") == [text]


@pytest.mark.parametrize(
    ("written", "texts"),
    [
        ("a,b", ["a", "b"]),
        ("'a,b',c", ["a,b", "c"]),
        ('"a,b",c', ["a,b", "c"]),
        ("it's,b", ["it's", "b"]),
        ("'a,b", ["'a", "b"]),
        ("'a'b,c", ["'a'b", "c"]),
        ("'it's,x',b", ["'it's", "x'", "b"]),
        ("x(1,2)", ["x(1", "2)"]),
        (",a", ["", "a"]),
        ("a,", ["a", ""]),
        ("a", ["a"]),
        ("", [""]),
    ],
)
def test_in_a_sweep_commas_separate_but_within_quotes(written, texts):
    assert as_hydra_reads(Config, f"note={written}", sweep=True) == texts


@pytest.mark.parametrize(
    ("written", "text"),
    [("'a,b'", "a,b"), ('"it\'s"', "it's"), ("\"'a'\"", "'a'"), ("''", ""), ("'", "'"), ("'a", "'a")],
)
def test_quotes_around_a_value_go(written, text):
    assert as_hydra_reads(Config, f"note={written}") == [text]


def test_a_tilde_is_the_home(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me, myself")
    values = {
        "~": "/home/me, myself",
        "~/a b": "/home/me, myself/a b",
        "./~": "./~",
        "~no such user/x": "~no such user/x",
    }
    for written, text in values.items():
        assert as_hydra_reads(Config, f"note={written}") == [text]
    assert as_hydra_reads(Config, "note=~/a,b", sweep=True) == ["/home/me, myself/a", "b"]


def test_null_is_nothing_only_where_there_may_be_nothing():
    @dataclass(frozen=True)
    class Texts:
        must: str = ""
        may: str | None = ""

    assert as_hydra_reads(Texts, "must=null") == ["null"]
    assert as_hydra_reads(Texts, "may=null") == [None]
    assert as_hydra_reads(Texts, "may=null,a,'null'", sweep=True) == [None, "a", "null"]


def test_the_module_of_a_task_is_imported(start, fails, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "my_robots.py").write_text("open('imported', 'w')")
    assert start("task=my_robots:Arm-v0")[0].task == "my_robots:Arm-v0"
    assert (tmp_path / "imported").exists()
    assert "cannot import 'no_robots'" in fails("task=no_robots:Arm-v0")


def test_nothing_else_is_imported(start, tmp_path):
    (tmp_path / "evil.py").write_text("open('imported', 'w')")
    start("task=a", "note=evil:Arm-v0")
    assert not (tmp_path / "imported").exists()


def test_other_errors_keep_their_traceback(start):
    with pytest.raises(ZeroDivisionError):
        start("task=a", main=raiser(ZeroDivisionError()))


INTERRUPTED = "interrupted: files written so far are kept"


def test_interrupt(fails):
    assert fails("task=a", main=raiser(KeyboardInterrupt()), status=130) == INTERRUPTED
    assert fails("-m", "task=a,b", main=raiser(KeyboardInterrupt()), status=130) == INTERRUPTED


@pytest.fixture
def handlers():
    """Those of the process, which must be the same afterwards."""
    before = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGHUP)}
    yield
    assert {s: signal.getsignal(s) for s in before} == before


def stopped(by: str) -> str:
    return f"stopped by {by}: files written so far are kept; run it again to continue"


@pytest.mark.parametrize("arguments", [["task=a"], ["--multirun", "task=a,b"]])
@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_signals_end_a_script_after_its_finally_blocks(fails, handlers, name, arguments):
    number, log = getattr(signal, name), []

    def main(config):
        try:
            os.kill(os.getpid(), number)
            log.append("not reached")
        except Exception:
            log.append("an error, which it is not")
        except Stopped:
            log.append("stopped")
            raise
        finally:
            os.kill(os.getpid(), signal.SIGTERM)  # another one does not disturb what is being saved
            os.kill(os.getpid(), signal.SIGHUP)
            log.append("saved")

    assert fails(*arguments, main=main, status=128 + number) == stopped(name)
    assert log == ["stopped", "saved"]


@pytest.mark.parametrize("arguments", [["task=a"], ["--multirun", "task=a,b"]])
def test_a_terminal_that_is_gone_hides_no_signal(fails, handlers, arguments):
    def main(config):
        try:
            os.kill(os.getpid(), signal.SIGHUP)
        finally:
            raise OSError(5, "Input/output error")

    assert fails(*arguments, main=main, status=129) == stopped("SIGHUP")


def test_nohup_is_heeded(start, handlers):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        seen = []
        start("task=a", main=lambda config: (os.kill(os.getpid(), signal.SIGHUP), seen.append(config)))
        assert seen
    finally:
        signal.signal(signal.SIGHUP, before)


def test_nobody_reads_on(start, capsys, monkeypatch):
    """As after `| head`: it ends silently, as programs do that SIGPIPE ends."""
    monkeypatch.setattr(sys, "stdout", sys.stdout)  # to be there again afterwards
    for arguments in (["task=a"], ["--multirun", "task=a,b"]):
        with pytest.raises(SystemExit) as e:
            start(*arguments, main=raiser(BrokenPipeError(32, "Broken pipe")))
        assert e.value.code == 141
    assert capsys.readouterr().err == ""


def test_outside_the_main_thread(start):
    seen = []
    thread = threading.Thread(target=lambda: start("task=a", main=seen.append))
    thread.start()
    thread.join()
    assert [config.task for config in seen] == ["a"]


def test_help(start, capsys):
    assert start("--help") == []
    out = capsys.readouterr().out
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert lines[0] == "python scripts/demo.py key=value ..."
    groups = ("What this script alone has.", "What several scripts share.", "A part of many steps.")
    assert sorted(map(lines.index, groups)) == [*map(lines.index, groups)]
    for line in (
        "task=... (required)",
        "seed=null null: a random one",
        "sizes=[1, 2]",
        'note="" free text',
        "colour=red",
        "resume=false",
        "steps=3",
        "rate=0.0003",
        "part.steps=10 of the agent",
        "long.steps=1000 of the agent",
        "long.rate=0.0003 a step",
        "part.may=null",
    ):
        assert lines.count(line) == 1, line
    assert "More words" not in out and "None" not in out


def test_provenance(monkeypatch):
    monkeypatch.setattr(sys, "argv", [str(Path("scripts/demo.py").absolute()), "task=a", "note=a b"])
    found = provenance()
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
    if config.task.startswith("SIG"):
        os.kill(os.getpid(), getattr(signal, config.task))
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
            timeout=120,
        )
        return result.returncode, result.stdout, result.stderr

    assert script("-m", "task=a,b") == (0, "did a\ndid b\n", "")
    assert script("task=SIGINT") == (130, "", f"{INTERRUPTED}\n")
    assert script("-m", "task=a,SIGTERM,b") == (143, "did a\n", f"{stopped('SIGTERM')}\n")
    status, out, _ = script("--help")
    assert status == 0
    assert re.search(r"task=\.\.\.  \(required\) +what to do", out)
    assert os.listdir(tmp_path) == ["script.py"]
