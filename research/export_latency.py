"""How fast an exported agent acts, with one thread and with two.

    python research/export_latency.py agents=[pretrained/walker-walk]

Writes `results/export.json`. Each agent is exported, and its own `run.py` takes the time of its steps.
"""

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import onnxruntime

from tdmpc2 import cli
from tdmpc2.checked import Checked
from tdmpc2.commands import export
from tdmpc2.export import imported
from tdmpc2.files import read_json, write_json
from tdmpc2.provenance import provenance


@dataclass(frozen=True, kw_only=True)
class Settings(Checked):
    """What is measured."""

    agents: tuple[str, ...] = ("pretrained/walker-walk", "pretrained/cartpole-swingup")
    plans: int = 100  # timed for each agent and number of threads
    out: str = "results/export.json"


def main(settings: Settings) -> None:
    records = []
    for agent in settings.agents:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "out"
            export.main(export.Settings(agent=agent, out=str(out)))
            program = imported(out / "run.py")
            manifest, difference = read_json(out / "manifest.json"), program.check(out)
            for threads in (1, 2):
                for kind, (median, slowest) in program.latency(out, threads, settings.plans).items():
                    records.append(
                        {
                            "task": manifest["task"],
                            "mode": manifest["mode"],
                            "threads": threads,
                            "step": kind,
                            "median_ms": median,
                            "slowest_ms": slowest,
                            "difference": difference,
                            "bytes": sum(manifest["bytes"].values()),
                        }
                    )
    about = {**provenance(), "onnxruntime": onnxruntime.__version__, "load": os.getloadavg()[0]}
    write_json(settings.out, {**about, "records": records})


if __name__ == "__main__":
    cli.run(Settings, main)
