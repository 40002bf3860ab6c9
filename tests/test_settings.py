"""Numbers that cannot be and folders that cannot be written are refused by name, before any work begins."""

import importlib
import math
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import pytest
from stand_ins import nested

from tdmpc2 import cli, commands
from tdmpc2.checked import from_json
from tdmpc2.commands import VERBS
from tdmpc2.envs.guard import Guard
from tdmpc2.errors import ConfigError, FileError

TEACHER = str(Path(__file__).parent / "fixtures/official/state_small.pt")
SETTINGS: dict[str, Any] = {
    verb: importlib.import_module(f"tdmpc2.commands.{verb}").Settings for verb in VERBS if verb != "tasks"
}
NUMBERS = (int, int | None, float, float | None)
SIGNED = {"model.vmin", "model.vmax"}  # in symlog units
MAY_BE_ZERO = {  # whatever part they are of
    *("seed", "calibration_seed"),
    *("rounds", "label_episodes", "num_pi_trajs", "seed_steps", "vmin", "vmax"),
    *("enc_lr_scale", "rho", "temperature", "min_std", "weight_decay"),
    "model_size",  # which the trainer looks up and refuses by name
    "workers",
    "min_return_pushed",
}


def test_no_verb_is_left_out() -> None:
    modules = {path.stem for path in Path(commands.__file__).parent.glob("*.py")}
    assert modules == {"__init__", *VERBS}


def refused(settings: type, name: str, value: Any) -> bool:
    """Whether these settings refuse the value of one of them, which then is named."""
    required = {
        f.name: "x" for f in fields(settings) if f.default is MISSING and f.default_factory is MISSING
    }
    try:
        from_json(settings, {**required, **nested({name: value})})
    except ConfigError as e:
        assert all(word in str(e) for word in name.split(".")) or "seeds overlap" in str(e), e
        return True
    return False


@pytest.mark.parametrize("script", SETTINGS)
def test_numbers_that_cannot_be(script: str) -> None:
    hints = {name: s.kind for name, s in cli._settings(SETTINGS[script]).items() if s.kind in NUMBERS}

    def accepted(value: Any, *types: Any) -> set[str]:
        return {n for n, hint in hints.items() if hint in types and not refused(SETTINGS[script], n, value)}

    for value in ("many", True, 2**63, [1], math.nan):
        assert not accepted(value, *NUMBERS)
    assert not accepted(1.5, int, int | None)
    assert not accepted(math.inf, float, float | None)
    assert accepted(-1, *NUMBERS) <= SIGNED
    assert accepted(-1e-9, float, float | None) <= SIGNED
    zero = {name.rpartition(".")[2] for name in accepted(0, *NUMBERS)}
    assert {name for name in zero if not name.endswith("_coef")} <= MAY_BE_ZERO


def no_work(*_: Any, **__: Any) -> None:
    raise AssertionError("work began")


@pytest.mark.parametrize("out", ["file", "file/out"])
@pytest.mark.parametrize("script", ["evaluate", "collect", "accelerate", "train"])
def test_a_folder_that_cannot_be_written_is_refused_before_the_work(
    script: str, out: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("in the way")
    monkeypatch.setattr(Guard, "reset", no_work)
    given = {"task": "walker-walk", "planner": {"compile": False}}
    given |= {"work_dir": out, "model_size": 1} if script == "train" else {"checkpoint": TEACHER, "out": out}
    with pytest.raises(FileError, match=f"^{out} cannot be written: (File exists|Not a directory)$"):
        importlib.import_module(f"tdmpc2.commands.{script}").main(from_json(SETTINGS[script], given))
