"""The provenance of results."""

import os
import platform
import re
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version
from pathlib import Path

import torch

from .version import __version__


def provenance() -> dict[str, str]:
    """Command, commit or version, machine, library versions, and date (UTC)."""
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
        "MuJoCo": version("mujoco"),
    }
    return {
        "command": " ".join([program(), *map(shlex.quote, sys.argv[1:])]),
        "commit": commit(),
        "machine": ", ".join(machine),
        "versions": ", ".join(f"{name} {v}" for name, v in versions.items())
        + f", {platform.system()} {platform.machine()}",
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def program() -> str:
    """The started program, as a user types it."""
    program = sys.argv[0]
    return f"python {os.path.relpath(program)}" if program.endswith(".py") else program


@cache
def commit() -> str:
    """The commit of the code; the version if there is no commit."""
    root = Path(__file__).parents[1]
    if (root / ".git").exists():
        command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
        try:
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            pass  # no git, or no commit yet
    return f"version {__version__}"
