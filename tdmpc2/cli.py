"""How every script starts: a dataclass of settings, `key=value` arguments, one line for every mistake.

    @dataclass(frozen=True, kw_only=True)
    class Config(PlannerConfig):
        task: str                 # no default: required
        seed: int | None = None   # the comment is what --help prints

    if __name__ == "__main__":
        cli.run(Config, main)     # main receives a Config

    python scripts/train.py task=walker-walk model_size=5          one run
    python scripts/train.py --multirun task=walker-walk seed=1,2   a sweep, Hydra's launchers included
    python scripts/train.py --help                                 all settings

Fields are flat. Their types: bool, int, float, str, Enum, `T | None`, and `tuple[T, ...]`, which a user
writes as `[1,2]`. Hydra itself writes nothing; a launcher that needs a folder, such as Slurm's, is given
one with `hydra.sweep.dir=FOLDER`.
"""

import inspect
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import MISSING, Field, asdict, fields
from datetime import UTC, datetime
from difflib import get_close_matches
from enum import Enum
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import hydra
import torch
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from .errors import ConfigError, TDMPC2Error
from .files import write_json

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Config = TypeVar("Config", bound="DataclassInstance")


def run(config_type: type[Config], main: Callable[[Config], Any]) -> None:
    """Read the command line as a `config_type` and hand that to `main`, once for each run of a sweep.

    A `TDMPC2Error`, from here or from `main`, ends the script with one line and status 1.
    """
    arguments = sys.argv[1:]
    if "--help" in arguments or "-h" in arguments:
        print(usage(config_type))
        return
    _commit()  # of the code that is loaded, whatever is committed while it runs
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra shall hand errors on, not print them itself
    single: list[DictConfig] = []  # of a sweep, Hydra's launcher runs each; one run is ours

    def job(settings: DictConfig) -> None:
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            main(_build(config_type, settings))
        else:
            single.append(settings)

    try:
        _check_names(config_type, arguments)
        with tempfile.TemporaryDirectory() as litter:
            _register(config_type, litter)
            hydra.main(version_base=None, config_path=None, config_name="start")(job)()
        for settings in single:
            main(_build(config_type, settings))
    except TDMPC2Error as e:
        _exit(f"error: {_one_line(e)}", 1)
    except (HydraException, OmegaConfBaseException) as e:
        _exit(f"error: {_reason(e)}", 1)
    except KeyboardInterrupt:
        _exit("interrupted: what was written so far stays", 130)


def usage(config_type: type[Config]) -> str:
    """All settings with their defaults and the comments beside them in the source, class by class."""
    lines = [f"python {Path(sys.argv[0]).name} key=value ..."]
    left = {field.name: field for field in fields(config_type)}
    for cls in config_type.__mro__:
        own = [left.pop(name) for name in vars(cls).get("__annotations__", {}) if name in left]
        if not own:
            continue
        comments = dict(re.findall(r"^    (\w+):.*?  #\s*(.*)$", inspect.getsource(cls), re.MULTILINE))
        lines += ["", (cls.__doc__ or cls.__name__).splitlines()[0]]
        for field in own:
            lines.append(f"  {_default(field):32} {comments.get(field.name, '')}".rstrip())
    lines += ["", "A sweep: --multirun key=1,2", "Hydra's own options: --hydra-help"]
    return "\n".join(lines)


def save_config(path: str | Path, config: "DataclassInstance") -> None:
    """Write a dataclass of settings as JSON."""
    write_json(path, asdict(config))


def provenance() -> dict[str, str]:
    """Where numbers come from: command, commit or version, machine, library versions, date (UTC)."""
    import mujoco

    if Path("/proc/cpuinfo").exists():
        names = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    else:
        names = [platform.processor()]
    machine = [
        next(filter(None, names), platform.machine()),
        f"{os.cpu_count()} cores",
        f"{torch.get_num_threads()} threads",
    ]
    if torch.cuda.is_available():
        machine.append(torch.cuda.get_device_name())
    versions = {
        "Python": platform.python_version(),
        "PyTorch": torch.__version__,
        "MuJoCo": mujoco.__version__,
    }
    return {
        "command": shlex.join(["python", os.path.relpath(sys.argv[0]), *sys.argv[1:]]),
        "commit": _commit(),
        "machine": ", ".join(machine),
        "versions": ", ".join(f"{name} {v}" for name, v in versions.items())
        + f", {platform.system()} {platform.machine()}",
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def _check_names(config_type: type[Config], arguments: list[str]) -> None:
    """Refuse what is no setting, before Hydra does so in more words."""
    names = [field.name for field in fields(config_type)]
    for before, argument in zip(["", *arguments], arguments, strict=False):
        name, equals, _ = argument.partition("=")
        if name.startswith("-"):
            if name.lstrip("-").replace("-", "_") in names:
                raise ConfigError(f"{argument}: settings are written without dashes, as key=value")
        elif before in ("--cfg", "-c", "--info", "-i", "--package", "-p"):
            continue  # the value of one of Hydra's own options
        elif not equals:
            raise ConfigError(f"{argument!r} is no setting: write key=value, e.g. {names[0]}=...")
        elif name not in names and not name.startswith(("hydra.", "hydra/", "+hydra.")):
            near = get_close_matches(name, names, n=3)
            hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
            raise ConfigError(f"unknown setting {name!r}; {hint}`--help` lists all")


def _register(config_type: type[Config], litter: str) -> None:
    """Put the settings in Hydra's store, and with them that it writes to `litter` only."""
    settings = OmegaConf.structured(config_type)
    OmegaConf.set_readonly(settings, None)  # which a frozen dataclass makes it
    store = ConfigStore.instance()
    store.store(name="settings", node=settings)
    no_log = [{"override hydra/job_logging": "none"}, {"override hydra/hydra_logging": "none"}]
    folders = {"run": {"dir": "."}, "sweep": {"dir": litter, "subdir": "."}, "output_subdir": None}
    store.store(name="start", node={"defaults": ["settings", *no_log, "_self_"], "hydra": folders})


def _build(config_type: type[Config], settings: DictConfig) -> Config:
    missing = sorted(OmegaConf.missing_keys(settings))
    if missing:
        raise ConfigError(f"{'=... '.join(missing)}=... is required; `--help` lists all settings")
    values = {str(name): settings[name] for name in settings}
    return config_type(**{name: tuple(v) if isinstance(v, ListConfig) else v for name, v in values.items()})


def _default(field: "Field[Any]") -> str:
    """`name=default`, as a user would type it."""
    value = field.default if field.default_factory is MISSING else field.default_factory()
    if value in (MISSING, "???"):
        return f"{field.name}=...  (required)"
    if isinstance(value, Enum):
        value = value.name
    text = value if isinstance(value, str) and value else json.dumps(value)
    return f"{field.name}={text}"


@cache
def _commit() -> str:
    from . import __version__

    root = Path(__file__).parents[1]
    if (root / ".git").exists():
        command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
        try:
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            pass  # no git here, or no commit yet
    return f"version {__version__}"


def _reason(error: HydraException | OmegaConfBaseException) -> str:
    """Hydra's or OmegaConf's message in one line, with the setting that it speaks of."""
    cause = error.__cause__ or error
    if isinstance(cause, OmegaConfBaseException):
        return f"{cause.full_key}: {str(cause).splitlines()[0]}"
    return _one_line(error)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _exit(message: str, status: int) -> None:
    print(message, file=sys.stderr)
    sys.exit(status)
