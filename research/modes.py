"""The modes that an acceleration evaluated, with their correctors."""

from pathlib import Path

from tdmpc2.checked import from_json
from tdmpc2.config import SpeculationConfig
from tdmpc2.corrector import BaseCorrector, load_corrector
from tdmpc2.files import read_json


def evaluated(folder: Path, name: str) -> SpeculationConfig:
    """The mode `name` of the acceleration in `folder`, with its calibrated thresholds."""
    return from_json(SpeculationConfig, read_json(folder / "evaluation/modes" / name / "settings.json"))


def corrector_of(folder: Path, mode: SpeculationConfig, teacher: str) -> BaseCorrector | None:
    """The corrector of `mode`, or None without one. Its teacher has the fingerprint `teacher`."""
    return load_corrector(folder / "correctors" / mode.corrector, teacher) if mode.corrector else None
