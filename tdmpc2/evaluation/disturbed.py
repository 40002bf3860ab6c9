"""Modes in a world that is not as modelled: what they keep of what replanning at every step keeps there.

    OUT/KIND-STRENGTH/NAME/     episodes.csv, steps.csv
    OUT/episodes.csv            all episodes together
    OUT/summary.csv             a row for every disturbance and mode
    OUT/provenance.json         where they come from

A run that is killed goes on with what is missing.
"""

from dataclasses import asdict, dataclass
from pathlib import Path

import pandas as pd
from rich.console import Console

from ..cli import provenance
from ..config import BudgetOverride, SpeculationConfig
from ..corrector import load_corrector
from ..errors import CheckpointError, ConfigError, TaskError
from ..files import read_json, write_json
from ..teacher import Teacher, open_teacher
from ..world_model.checkpoint import read_config
from .evaluate import EvaluationConfig, Subject, check_evaluation, claim, run_modes, write_csv
from .metrics import summarise
from .modes import BASELINE, DISTILLED

STRENGTHS = {
    "push": (0.1, 0.3, 1.0),
    "obs_noise": (0.01, 0.03, 0.1),
    "mass": (0.7, 1.3, 1.6),
    "friction": (0.4, 0.7, 1.5),
}


@dataclass(frozen=True, kw_only=True)
class DisturbedConfig(BudgetOverride, EvaluationConfig):
    """What is evaluated under disturbance."""

    agent: str  # a folder that scripts/accelerate.py made
    out: str = ""  # folder for the results; default: disturbed/ in the agent's
    device: str = "cpu"
    kinds: tuple[str, ...] = tuple(STRENGTHS)


def evaluate_disturbed(config: DisturbedConfig, console: Console) -> pd.DataFrame:
    """The chosen mode beside the baseline and what cannot know that it is lost, under every disturbance.

    Returns:
        Columns `kind, strength` and those of `summarise`; ratios are to the baseline under the same
        disturbance, on the same seeds.

    Raises:
        CheckpointError: the folder is not one that `scripts/accelerate.py` finished.
        ConfigError: a setting cannot be, there is no such kind, or the folder for the results has others.
        TaskError: the task cannot be disturbed.
    """
    check_evaluation(config)
    if not config.kinds or set(config.kinds) - set(STRENGTHS):
        raise ConfigError(f"kinds={list(config.kinds)}: choose of {', '.join(STRENGTHS)}")
    folder = Path(config.agent)
    if not (folder / "evaluation" / "provenance.json").exists():
        raise CheckpointError(f"{folder} holds no finished run of scripts/accelerate.py")
    teacher = open_teacher(read_config(folder)["task"], str(folder), config, config.device)
    about = read_json(folder / "evaluation" / "provenance.json")
    names = list(about["correctors"])
    correctors = {
        n: load_corrector(folder / "correctors" / n, teacher.fingerprint, config.device) for n in names
    }
    wanted = dict.fromkeys([BASELINE, about["chosen"], "naive_6", DISTILLED, "prior"])
    modes = {n: SpeculationConfig(**about["modes"][n]) for n in wanted if n in about["modes"]}
    worlds: dict[tuple[str, float], Teacher] = {}
    reasons = []
    for kind in config.kinds:
        try:
            worlds |= {(kind, strength): teacher.disturbed(kind, strength) for strength in STRENGTHS[kind]}
        except TaskError as e:
            console.print(f"without {kind}: {e}")
            reasons.append(str(e))
    if not worlds:
        raise TaskError(reasons[0])
    out = Path(config.out or folder / "disturbed")
    summaries: list[pd.DataFrame] = []
    episodes: list[pd.DataFrame] = []
    settings = {
        "teacher": teacher.fingerprint,
        "planner": asdict(teacher.planner),
        "compute": asdict(teacher.compute),
        "correctors": about["correctors"],
        "kinds": list(config.kinds),
        "seeds": list(config.eval_seeds),
        "num_envs": config.num_envs,
    }
    claim(out, settings)
    for (kind, strength), world in worlds.items():
        console.print(f"{kind} {strength}")
        name = out / f"{kind}-{strength}"
        result = run_modes(Subject(world, correctors), modes, config, config.eval_seeds, name, console)
        summary = summarise(result.episodes, result.steps, None)
        for tables, own in ((summaries, summary), (episodes, result.episodes)):
            own.insert(0, "kind", kind)
            own.insert(1, "strength", strength)
            tables.append(own)
    table = pd.concat(summaries, ignore_index=True)
    write_csv(out / "episodes.csv", pd.concat(episodes, ignore_index=True))
    write_csv(out / "summary.csv", table)
    write_json(out / "provenance.json", {**provenance(), **settings})
    return table
