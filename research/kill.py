"""Kill a tiny run at random moments, go on with it, and compare it with a run that was never killed.

    python research/kill.py                          training, 20 kills with SIGKILL
    python research/kill.py what=accelerating

A run is killed and started again until it ends, then compared file by file and byte by byte, and another
one begins, until all kills are spent. Left out, because they differ by nature: hidden files (locks,
temporary files), `tensorboard/` (its files are named after time and process), measured times (entries and
columns `seconds`, and what depends on their digits), and what says when and where something was made
(`provenance`, report.html). Accelerating chooses by measured times, so killed runs are given those of the
whole run.
"""

import csv
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tdmpc2.checked import at_least
from tdmpc2.cli import run
from tdmpc2.errors import ConfigError, TDMPC2Error

ROOT = Path(__file__).resolve().parents[1]
PLANNER = (
    "planner.compile=false planner.num_samples=16 planner.iterations=1 planner.num_elites=4 "
    "planner.num_pi_trajs=2"
)
COMMANDS = {  # each run has a working directory of its own, and leaves `run` there
    "training": "train task=InvertedPendulum-v5 model_size=1 steps=150 seed_steps=60 "
    "update.batch_size=8 evaluation.freq=50 evaluation.episodes=2 "
    f"checkpoint_freq=30 work_dir=run resume=true {PLANNER}",
    # A teacher that is better than random actions, so that a mode is chosen.
    "teaching": "train task=InvertedPendulum-v5 model_size=1 steps=600 seed_steps=100 "
    "update.batch_size=32 evaluation.freq=200 evaluation.episodes=2 "
    f"checkpoint_freq=300 work_dir=run resume=true {PLANNER}",
    "accelerating": "accelerate task=InvertedPendulum-v5 "
    "checkpoint=../teacher/run/teacher out=run rounds=1 round_updates=5 "
    "data.episodes=3 data.round_episodes=3 distillation.updates=10 evaluation.calibration_episodes=2 "
    "evaluation.episodes=2 evaluation.num_envs=3 evaluation.label_episodes=0 evaluation.latency_steps=5 "
    f"{PLANNER}",
}
GIVEN = Path("run/evaluation/latency.csv")
# Measured times, the sizes of tables and the digests of files with such times, and when it was.
NOT_COMPARED = {"seconds", "table_sizes", "digest", "provenance"}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is killed, and how often."""

    what: str = "training"  # or teaching, for longer; or accelerating
    kills: int = 20
    seed: int = 0  # of the moments


class Life:
    """A process at work in `folder`, from its first line on."""

    def __init__(self, what: str, folder: Path):
        self.log = folder / "output.txt"
        with self.log.open("w") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tdmpc2", *COMMANDS[what].split()],
                cwd=folder,
                env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        while self.process.poll() is None and not self.log.stat().st_size:
            time.sleep(0.01)

    def ended_within(self, seconds: float | None) -> bool:
        """Whether it ended by itself; after so many seconds it is killed."""
        try:
            status = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        finally:  # also where this program is stopped
            if self.process.poll() is None:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()
        if status:
            raise TDMPC2Error(f"status {status} in {self.log.parent}: {self.log.read_text()[-1000:]}")
        return True

    def last_line(self) -> str:
        return self.log.read_text().strip().splitlines()[-1]


def main(settings: Settings) -> None:
    s, moments = settings, random.Random(settings.seed)
    at_least(1, s, "kills")
    if s.what not in COMMANDS:
        raise ConfigError(f"what={s.what}: must be one of {', '.join(COMMANDS)}")
    work = Path(tempfile.mkdtemp())
    whole = work / "whole"
    whole.mkdir()
    if s.what == "accelerating":
        (work / "teacher").mkdir()
        Life("teaching", work / "teacher").ended_within(None)
    life, began = Life(s.what, whole), time.monotonic()
    life.ended_within(None)
    seconds = time.monotonic() - began
    print(f"{s.what}: {seconds:.1f} s from the first line to the end; all in {work}", flush=True)
    kills = runs = 0
    while kills < s.kills:
        runs += 1
        folder = work / str(runs)
        if (whole / GIVEN).exists():
            (folder / GIVEN.parent).mkdir(parents=True)
            shutil.copy(whole / GIVEN, folder / GIVEN)
        folder.mkdir(exist_ok=True)
        while True:
            life, after = Life(s.what, folder), moments.uniform(0, seconds)
            if life.ended_within(after if kills < s.kills else None):
                break
            kills += 1
            print(f"run {runs}, kill {kills} after {after:.1f} s: {life.last_line()}", flush=True)
        if different := list(differences(whole / "run", folder / "run")):
            raise TDMPC2Error(f"run {runs} left something else: {', '.join(different)}; all is in {work}")
        print(f"run {runs} left the same", flush=True)
    print(f"{kills} kills in {runs} runs, and every file that is compared is the same")
    shutil.rmtree(work)


def differences(a: Path, b: Path) -> Iterator[str]:
    """The files that one of two folders lacks, or that differ."""
    for name in sorted(files(a) | files(b)):
        if not ((a / name).exists() and (b / name).exists() and content(a / name) == content(b / name)):
            yield str(name)


def files(folder: Path) -> set[Path]:
    paths = {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}
    return {
        path
        for path in paths
        if not path.name.startswith(".")
        and path.parts[0] != "tensorboard"
        and path.name not in ("provenance.json", "report.html")
    }


def content(path: Path) -> Any:
    """What is compared of a file."""
    raw = path.read_bytes()
    if path.suffix == ".json":
        return compared(json.loads(raw))
    if path.suffix == ".csv":
        return [compared(row) for row in csv.DictReader(raw.decode().splitlines())]
    if path.suffix == ".safetensors":
        end = 8 + int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8:end])
        about = json.loads(header.pop("__metadata__", {}).get("tdmpc2", "{}"))
        return header, compared(about), raw[end:]
    return raw


def compared(value: Any) -> Any:
    """A JSON value without the entries that differ by nature."""
    if isinstance(value, dict):
        return {name: compared(v) for name, v in value.items() if name not in NOT_COMPARED}
    return [compared(v) for v in value] if isinstance(value, list) else value


if __name__ == "__main__":
    run(Settings, main)
