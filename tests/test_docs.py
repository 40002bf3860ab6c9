"""Code in README and docs runs, and commands there have settings that exist."""

import importlib
import re
import shlex
from collections.abc import Iterator
from inspect import get_annotations
from pathlib import Path
from typing import Any, get_type_hints

import gymnasium as gym
import pytest

import tdmpc2
from tdmpc2 import corrector
from tdmpc2.commands import VERBS
from tdmpc2.config import EAGER

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
STEPS = 6  # of an episode
GENERATED = re.compile(r"<!-- (\w+) -->\n.*?<!-- /\1 -->", re.DOTALL)  # its commands are of earlier versions
FENCE = re.compile(r"(<!-- not run: .+ -->\n)?^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def blocks(page: str, *languages: str) -> Iterator[str]:
    """The code of a page in these languages that is to be run."""
    for not_run, language, code in FENCE.findall(GENERATED.sub("", page)):
        if language in languages and not not_run:
            yield code


def commands(page: str) -> Iterator[list[str]]:
    """The arguments of each `tdmpc2 VERB ...` in a page's shell code."""
    for code in blocks(page, "sh", "bash"):
        for line in code.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ["tdmpc2"]:
                yield words[1:]


def has_setting(config: type, name: str) -> bool:
    """Whether a dataclass of settings has `name`, which may be in a part of it, as in `planner.horizon`."""
    first, _, rest = name.partition(".")
    hints = get_type_hints(config)
    return first in hints and (not rest or has_setting(hints[first], rest))


def wrong(arguments: list[str]) -> str:
    """What is wrong with the arguments of the command `tdmpc2`, "" where nothing is."""
    verb, *rest = arguments
    if verb not in VERBS:
        return f"no verb {verb}"
    settings = importlib.import_module(f"tdmpc2.commands.{verb}").Settings
    if rest and "=" not in rest[0] and next(iter(get_annotations(settings))) == "agent":
        rest = rest[1:]
    for argument in rest:
        name, equals, _ = argument.partition("=")
        if not argument.startswith("--") and not (equals and has_setting(settings, name)):
            return f"no setting {argument}"
    return ""


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_commands_have_settings_that_exist(page: Path) -> None:
    found = list(commands(page.read_text()))
    assert [(arguments, fault) for arguments in found if (fault := wrong(arguments))] == []


def test_a_wrong_command_is_found() -> None:
    page = "```bash\ntdmpc2 train task=a \\\n  stepps=1  # so\n```\n```text\ntdmpc2 no\n```\n"
    page += "<!-- speed -->\n```sh\ntdmpc2 no\n```\n<!-- /speed -->\n```sh\nls\ntdmpc2 fly\n```\n"
    assert [wrong(c) for c in commands(page)] == ["no setting stepps=1", "no verb fly"]
    assert wrong(["play", "a/folder", "out=a.gif"]) == "" and wrong(["train", "a/folder"]) != ""


def test_code_that_is_not_to_be_run_says_so() -> None:
    page = "```python\n1\n```\n<!-- not run: slow -->\n```python\n2\n```\n``` {.python}\n3\n```\n"
    assert list(blocks(page, "python")) == ["1\n"]


@pytest.mark.parametrize(
    "page", [page for page in PAGES if any(blocks(page.read_text(), "python"))], ids=lambda path: path.stem
)
def test_code_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without compiling, with short episodes, in a folder with the shipped agents and one that was made."""
    (tmp_path / "pretrained").symlink_to(ROOT / "pretrained")
    (tmp_path / "accelerated").mkdir()
    (tmp_path / "accelerated/walker-walk").symlink_to(ROOT / "pretrained/walker-walk")
    make_env, load_agent = tdmpc2.make_env, tdmpc2.load_agent

    def short(*args: Any, **kwargs: Any) -> gym.Env:
        return gym.wrappers.TimeLimit(make_env(*args, **kwargs), STEPS)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(corrector, "ARCHITECTURES", dict(corrector.ARCHITECTURES))  # a page adds one
    monkeypatch.setattr(tdmpc2, "make_env", short, raising=False)
    monkeypatch.setattr(
        tdmpc2, "load_agent", lambda *args, **given: load_agent(*args, **{**given, "compute": EAGER})
    )
    names: dict[str, Any] = {}
    for code in blocks(page.read_text(), "python"):
        exec(compile(code, str(page), "exec"), names)
