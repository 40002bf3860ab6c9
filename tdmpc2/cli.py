"""The start of every command: a dataclass of settings, `key=value` arguments, one line per mistake.

    @dataclass(frozen=True, kw_only=True)
    class Config:
        task: str                 # no default: required
        seed: int | None = None   # the comment is what --help prints
        planner: PlannerConfig = field(default_factory=PlannerConfig)

    cli.run(Config, main)         # main receives a Config

    tdmpc2 train task=walker-walk planner.horizon=5     one run
    tdmpc2 train --multirun task=walker-walk seed=1,2   a sweep, Hydra's launchers included
    tdmpc2 train --help                                 all settings

A setting is a field of the dataclass or of one of its parts. A part is a dataclass whose fields all have
defaults. Types are bool, int, float, str, Enum, `T | None`, and `tuple[T, ...]`, written as `[1,2]`.
Text may have any characters: `checkpoint=models/José (1),v=2.pt`. A `~` in front becomes the user's home;
quotes around the text are removed. In a sweep, commas outside quotes separate values.

A task named `my_package:MyEnv-v0` imports `my_package`. No other setting imports a module.

Hydra itself writes nothing. A launcher that needs a folder, such as Slurm's, takes `hydra.sweep.dir=FOLDER`.
"""

import inspect
import json
import os
import re
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import MISSING, asdict, fields, is_dataclass
from difflib import get_close_matches
from enum import Enum
from functools import cache
from itertools import groupby
from types import FrameType
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, TypeVar, get_origin

import hydra
import torch
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from .checked import from_json, types
from .errors import ConfigError, Stopped, TDMPC2Error
from .files import flat
from .provenance import commit, program

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Config = TypeVar("Config", bound="DataclassInstance")
TEXT = (str, str | None)  # types of text settings
# One value of a text setting in a sweep: in quotes, or up to the next comma.
ITEM = re.compile(r"""('[^']*'|"[^"]*"|[^,]*),""")
# Windows lacks SIGHUP.
STOPPING = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]


def run(config_type: type[Config], main: Callable[[Config], Any]) -> None:
    """Read the command line as a `config_type` and call `main` with it, once per run of a sweep.

    An error that the user can fix ends the process with one line and status 1: a `TDMPC2Error`, a file that
    cannot be read or written, too little memory. In a sweep the other runs go on. Ctrl-C raises
    `KeyboardInterrupt`, SIGTERM and SIGHUP raise `Stopped`: `finally` and `with` blocks run, then the process
    ends with one line and status 128 plus the signal's number.
    """
    arguments = sys.argv[1:]
    stopped: list[signal.Signals] = []
    try:
        if "--help" in arguments or "-h" in arguments:
            print(usage(config_type), flush=True)
            return
        commit()  # cached now: the commit of the loaded code
        with _signals_raise(stopped):
            configs = _read(config_type, main, arguments)
            if len(configs) > 1:
                _sweep(configs, main, stopped)
            elif configs:
                _start(configs[0], main)
    except BaseException as e:
        # Signals first: a closed terminal sends one, and also makes writing fail.
        if stopped:
            ended = f"stopped by {stopped[0].name}: files written so far are kept; run it again to continue"
            fail(ended, 128 + stopped[0])
        if isinstance(e, KeyboardInterrupt):
            fail("interrupted: files written so far are kept", 128 + signal.SIGINT)
        if isinstance(e, BrokenPipeError):  # the reader has closed, as after `| head`
            sys.stdout = None  # type: ignore[assignment]  # drop the rest of the output
            sys.exit(128 + signal.SIGPIPE)
        if (line := _mistake(e)) is None:
            raise
        fail(f"error: {line}")


def usage(config_type: type[Config]) -> str:
    """The --help text: all settings by part, with defaults and the comments beside them in the source."""
    lines = [f"{program()} key=value ..."]
    for cls, own in groupby(_settings(config_type).values(), lambda setting: setting.owner):
        lines += ["", (cls.__doc__ or cls.__name__).splitlines()[0]]
        source = "".join(inspect.getsource(c) for c in cls.__mro__[-2::-1])  # all but object's
        comments = dict(re.findall(r"^    (\w+):.*?  #\s*(.*)$", source, re.MULTILINE))
        for setting in own:
            text = f"{setting.name}={_typed(setting.default)}"
            lines.append(f"  {text:40} {comments.get(_last(setting.name), '')}".rstrip())
    lines += ["", "A sweep: --multirun key=1,2", "Hydra's own options: --hydra-help"]
    return re.sub(r"\bNone\b", "null", "\n".join(lines))  # as Hydra spells it


@contextmanager
def _signals_raise(stopped: list[signal.Signals]) -> Iterator[None]:
    """The first SIGTERM or SIGHUP raises `Stopped` and is appended to `stopped`; later ones are ignored.

    A closed terminal sends two. The second must not interrupt the saving that the first one started.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        if not stopped:
            stopped.append(signal.Signals(number))
            raise Stopped(stopped[0].name)

    before = {}
    if threading.current_thread() is threading.main_thread():  # only this one can set handlers
        for s in STOPPING:
            if signal.getsignal(s) != signal.SIG_IGN:  # set by nohup
                before[s] = signal.signal(s, stop)
    try:
        yield
    finally:
        for s, handler in before.items():
            signal.signal(s, handler or signal.SIG_DFL)


def _read(config_type: type[Config], main: Callable[[Config], Any], arguments: Sequence[str]) -> list[Config]:
    """The configs to run in this process: one, all of a sweep, or none if a launcher has run them."""
    sweep = "--multirun" in arguments or "-m" in arguments or "hydra.mode=MULTIRUN" in arguments
    read: list[DictConfig] = []

    def job(settings: DictConfig) -> None:
        about = HydraConfig.get()
        if about.mode == RunMode.MULTIRUN and about.runtime.choices["hydra/launcher"] != "basic":
            _start(_build(config_type, settings), main)  # may be another process or machine
        else:
            read.append(settings)

    _check_names(config_type, arguments)
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises errors instead of printing them
    typed = sys.argv
    given = [_for_hydra(config_type, argument, sweep) for argument in arguments]
    # Options first: argparse refuses settings after an option that follows settings.
    sys.argv = [typed[0], *sorted(given, key=lambda a: "=" in a and not a.startswith("-"))]
    try:
        with tempfile.TemporaryDirectory() as litter:
            _register(config_type, litter)
            hydra.main(version_base=None, config_path=None, config_name="start")(job)()
        return [_build(config_type, settings) for settings in read]
    except (HydraException, OmegaConfBaseException) as e:
        raise ConfigError(_reason(e)) from e
    finally:
        sys.argv = typed


def _sweep(
    configs: Sequence[Config], main: Callable[[Config], Any], stopped: Sequence[signal.Signals]
) -> None:
    """Run the configs one after another; print the settings and the error of each that fails."""
    values = [flat(asdict(config)) for config in configs]
    names = [name for name in values[0] if any(v[name] != values[0][name] for v in values)]
    failed = 0
    for config, own in zip(configs, values, strict=True):
        try:
            _start(config, main)
        except Exception as e:
            if stopped or isinstance(e, BrokenPipeError):
                raise
            failed += 1
            if (line := _mistake(e)) is None:
                traceback.print_exc()
            which = " ".join(f"{name}={own[name]}" for name in names)
            print(f"error: {which}: {line or 'see above'}", file=sys.stderr)
    if failed:
        raise TDMPC2Error(f"{failed} of {len(configs)} runs failed")


def _start(config: Config, main: Callable[[Config], Any]) -> None:
    """Import the module of the user's task, if it names one, and run `main`."""
    task = getattr(config, "task", None)
    if task and ":" in task:
        from .envs import import_module

        import_module(task)
    main(config)


def _for_hydra(config_type: type[Config], argument: str, sweep: bool) -> str:
    """An argument, escaped for Hydra's grammar."""
    name, equals, value = argument.partition("=")
    setting = _settings(config_type).get(name)
    if not equals or setting is None:  # one of Hydra's own
        return argument
    if setting.kind in TEXT:
        items = [match[1] for match in ITEM.finditer(value + ",")] if sweep else [value]
        own = [item if item == "null" and setting.kind is not str else _quoted(item) for item in items]
        return f"{name}={','.join(own)}"
    if get_origin(setting.kind) is tuple and value and "[" not in value:
        raise ConfigError(f"{argument}: a list has brackets, as in {name}=[{value}]")
    try:
        override = OverridesParser.create().parse_override(argument)
    except HydraException as e:
        raise ConfigError(f"{argument}: this value cannot be read; `--help` shows the format") from e
    if override.is_sweep_override() and not sweep:
        raise ConfigError(f"{argument}: several values make a sweep, with --multirun; write a list as [1,2]")
    return argument


def _quoted(text: str) -> str:
    """`text`, escaped for Hydra, without quotes around it, and with the user's home for a leading `~`."""
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        text = text[1:-1]
    text = os.path.expanduser(text)
    text = re.sub(r"(\\*)\$\{", r"\1\1\\${", text)  # otherwise an interpolation
    return QuotedString(text, Quote.single).with_quotes()


def _check_names(config_type: type[Config], arguments: Sequence[str]) -> None:
    """Refuse unknown settings with one line; Hydra's message would be longer."""
    names = [*_settings(config_type)]
    for before, argument in zip(["", *arguments], arguments, strict=False):
        name, equals, _ = argument.partition("=")
        if name.startswith("-"):
            if name.lstrip("-").replace("-", "_") in {*names, *map(_last, names)}:
                raise ConfigError(f"{argument}: settings are written without dashes, as key=value")
        elif before in ("--cfg", "-c", "--info", "-i", "--package", "-p"):
            continue  # the value of a Hydra option
        elif not equals:
            example = f"checkpoint={argument}" if "checkpoint" in names and os.path.exists(argument) else ""
            raise ConfigError(
                f"{argument!r} is not key=value: write settings without spaces, e.g. "
                f"{example or f'{names[0]}=...'}, and quotes around a value with spaces"
            )
        elif name not in names and not name.startswith(("hydra.", "hydra/", "+hydra.")):
            near = " or ".join(_nearest(name, names))
            hint = f"did you mean {near}?" if near else "`--help` lists all"
            raise ConfigError(f"unknown setting {name!r}; {hint}")


def _nearest(name: str, names: Sequence[str]) -> list[str]:
    """At most three settings with similar names."""
    same = [n for n in names if _last(n) == _last(name) or n.startswith(f"{name}.")]
    part, _, last = name.partition("_")  # TD-MPC2's eval_episodes is evaluation.episodes
    of_part = [n for n in names if n.startswith(part) and _last(n) == last]
    close = get_close_matches(_last(name), [*map(_last, names)], n=1)
    return (same or of_part or [n for n in names if _last(n) in close])[:3]


def _last(name: str) -> str:
    """`num_samples` of `planner.num_samples`."""
    return name.rpartition(".")[2]


class _Setting(NamedTuple):
    name: str  # as typed: planner.num_samples
    kind: Any  # its type
    default: Any  # MISSING: required
    owner: type  # the dataclass that has this field


@cache
def _settings(config_type: type) -> dict[str, _Setting]:
    """All settings by name, with the settings of parts."""

    def of(cls: type, prefix: str, default: Any) -> Iterator[_Setting]:
        for f in fields(cls):
            own = f.default if f.default_factory is MISSING else f.default_factory()
            own = own if default is None else getattr(default, f.name)
            kind = types(cls)[f.name]
            if is_dataclass(kind):
                yield from of(kind, f"{prefix}{f.name}.", own)  # type: ignore[arg-type]
            else:
                yield _Setting(prefix + f.name, kind, own, cls)

    return {setting.name: setting for setting in of(config_type, "", None)}


def _register(config_type: type[Config], litter: str) -> None:
    """Put the settings in Hydra's store; Hydra then writes to `litter` only."""
    settings = OmegaConf.structured(config_type)
    parts = [settings[name] for name, kind in types(config_type).items() if is_dataclass(kind)]
    for node in (settings, *parts):
        OmegaConf.set_readonly(node, None)  # frozen dataclasses are read-only
    store = ConfigStore.instance()
    store.store(name="settings", node=settings)
    no_log = [{"override hydra/job_logging": "none"}, {"override hydra/hydra_logging": "none"}]
    folders = {"run": {"dir": "."}, "sweep": {"dir": litter, "subdir": "."}, "output_subdir": None}
    store.store(name="start", node={"defaults": ["settings", *no_log, "_self_"], "hydra": folders})


def _build(config_type: type[Config], settings: DictConfig) -> Config:
    missing = sorted(OmegaConf.missing_keys(settings))
    if missing:
        raise ConfigError(f"{'=... '.join(missing)}=... is required; `--help` lists all settings")
    return from_json(config_type, OmegaConf.to_container(settings, resolve=True))


def _typed(value: Any) -> str:
    """A default value, as a user types it."""
    if value in (MISSING, "???"):
        return "...  (required)"
    if isinstance(value, Enum):
        value = value.name
    return value if isinstance(value, str) and value else json.dumps(value)


def _reason(error: HydraException | OmegaConfBaseException) -> str:
    """Hydra's or OmegaConf's message in one line, with the name of the setting."""
    cause = error.__cause__ or error
    if isinstance(cause, OmegaConfBaseException):
        return f"{cause.full_key}: {str(cause).splitlines()[0]}"
    return _one_line(error)


def _mistake(error: BaseException) -> str | None:
    """The message of an error that the user can fix; None for a bug."""
    if isinstance(error, TDMPC2Error):
        return _one_line(error)
    if isinstance(error, OSError):
        return f"{error.filename}: {error.strerror}" if error.filename else _one_line(error)
    # PyTorch raises a plain RuntimeError if the CPU's memory is full.
    on_cpu = isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    if on_cpu or isinstance(error, MemoryError | torch.OutOfMemoryError):
        return "out of memory: use a smaller batch, buffer or model, or fewer environments"
    return None


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def fail(message: str, status: int = 1) -> NoReturn:
    """Print a line on stderr and end the process."""
    with suppress(OSError):  # the terminal may be gone
        print(message, file=sys.stderr)
    sys.exit(status)
