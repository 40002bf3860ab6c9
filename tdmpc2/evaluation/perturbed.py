"""Modes in perturbed worlds, compared with replanning at every step in the same world.

    OUT/KIND-STRENGTH/NAME/     episodes.csv, steps.csv
    OUT/episodes.csv            all episodes
    OUT/summary.csv             one row per perturbation and mode
    OUT/provenance.json         command, commit, machine, settings

A second run continues with the missing modes.
"""

from dataclasses import asdict, dataclass, field
from pathlib import Path

import pandas as pd

from ..checked import Checked, at_least
from ..config import BudgetOverride, SpeculationConfig
from ..corrector import ARCHITECTURES, load_corrector
from ..errors import CheckpointError, ConfigError, TaskError
from ..files import in_use, read_json, write_json
from ..progress import Progress
from ..provenance import provenance
from ..teacher import Teacher, open_teacher
from ..workers import Workers
from ..world_model.checkpoint import saved_as
from .config import EpisodesConfig, EvaluationConfig, check_unseen, overlap
from .metrics import summarise
from .modes import BASELINE, DISTILLED, REFINED, is_mode
from .runs import Run, Subject, claim, execute, kept, runs_of, write_csv

STRENGTHS = {  # of each kind of perturbation, in the units of `envs.perturb.KINDS`
    "push": (0.1, 0.3, 1.0),
    "obs_noise": (0.01, 0.03, 0.1),
    "mass": (0.7, 1.3, 1.6),
    "friction": (0.4, 0.7, 1.5),
}


@dataclass(frozen=True, kw_only=True)
class PerturbedConfig(Checked):
    """Which agent to evaluate, and under which perturbations."""

    agent: str  # a folder that `tdmpc2 accelerate` made
    task: str = ""  # default: the agent's; give your own task, module:EnvId (a folder imports no module)
    out: str = ""  # folder for the results; default: perturbed/ in the agent's folder
    device: str = "cpu"
    workers: int = 0  # processes with one thread each; 0: one per core, on a GPU one in all
    kinds: tuple[str, ...] = tuple(STRENGTHS)
    planner: BudgetOverride = field(default_factory=BudgetOverride)
    evaluation: EpisodesConfig = field(default_factory=EpisodesConfig)

    def check_ranges(self) -> None:
        at_least(0, self, "workers")
        if not self.kinds or set(self.kinds) - set(STRENGTHS):
            raise ConfigError(f"kinds={list(self.kinds)}: choose from {', '.join(STRENGTHS)}")


def evaluate_perturbed(config: PerturbedConfig, progress: Progress) -> pd.DataFrame:
    """Evaluate the chosen mode, the baseline and modes without fallback under every perturbation.

    Returns:
        Columns `kind, strength` and the columns of `summarise`. Ratios are to the baseline under the same
        perturbation, on the same seeds.

    Raises:
        CheckpointError: the folder is not a finished run of `tdmpc2 accelerate`.
        ConfigError: a setting is invalid, the agent was made with episodes of these seeds, or the folder
            for the results has other settings.
        TaskError: the task cannot be perturbed.
    """
    folder, seeds = Path(config.agent), config.evaluation.seeds
    if not (folder / "evaluation" / "provenance.json").exists():
        raise CheckpointError(f"{folder} holds no finished run of `tdmpc2 accelerate`")
    teacher = open_teacher(config.task, str(folder), config.planner, device=config.device)
    about = read_json(folder / "evaluation" / "provenance.json")
    if "evaluation" not in about:
        raise CheckpointError(f"{folder} is of an earlier version: make it again with `tdmpc2 accelerate`")
    # Names from a file become parts of paths: known names only.
    named = {about["chosen"], *about["modes"]}
    if not (all(map(is_mode, named)) and set(about["correctors"]) <= set(ARCHITECTURES)):
        raise CheckpointError(f"{folder} names unknown modes or correctors: make it again")
    paths = {name: folder / "correctors" / name for name in about["correctors"]}
    check_unseen(seeds, paths.values())
    if overlap(seeds, saved_as(EvaluationConfig, about["evaluation"], folder).calibration_seeds):
        raise ConfigError(f"{folder} was calibrated on episodes with these seeds: change evaluation.seed")
    correctors = {n: load_corrector(path, teacher.fingerprint, config.device) for n, path in paths.items()}
    wanted = dict.fromkeys([BASELINE, about["chosen"], "naive_6", DISTILLED + REFINED, "prior"])
    given = {n: about["modes"][n] for n in wanted if n in about["modes"]}
    modes = {n: saved_as(SpeculationConfig, mode, folder) for n, mode in given.items()}
    worlds: dict[tuple[str, float], Teacher] = {}
    reasons = []
    for kind in config.kinds:
        try:
            worlds |= {(kind, strength): teacher.perturbed(kind, strength) for strength in STRENGTHS[kind]}
        except TaskError as e:
            progress.print(f"without {kind}: {e}")
            reasons.append(str(e))
    if not worlds:
        raise TaskError(reasons[0])
    out = Path(config.out or folder / "perturbed")
    settings = {
        "teacher": teacher.fingerprint,
        "planner": asdict(teacher.planner),
        "compute": asdict(teacher.compute),
        "correctors": about["correctors"],
        "kinds": list(config.kinds),
        "seeds": list(seeds),
        "num_envs": config.evaluation.num_envs,
    }
    with in_use(out):
        claim(out, settings)
        num_envs = config.evaluation.num_envs
        runs = {
            (kind, strength): runs_of(
                Subject(world, correctors), modes, seeds, num_envs, out / f"{kind}-{strength}"
            )
            for (kind, strength), world in worlds.items()
        }
        every: dict[str, Run] = {
            f"{kind} {strength}, {mode}": run
            for (kind, strength), own in runs.items()
            for mode, run in own.items()
        }
        execute(every, "episodes", Workers.of(config.workers, config.device, progress))
        results = {key: kept(own) for key, own in runs.items()}
        table = _together({key: summarise(r.episodes, r.steps, None) for key, r in results.items()})
        write_csv(out / "episodes.csv", _together({key: r.episodes for key, r in results.items()}))
        write_csv(out / "summary.csv", table)
        write_json(out / "provenance.json", {**provenance(), **settings})
    return table


def _together(tables: dict[tuple[str, float], pd.DataFrame]) -> pd.DataFrame:
    """The tables as one, with columns `kind` and `strength` in front."""
    return (
        pd.concat(tables, names=["kind", "strength"]).reset_index(["kind", "strength"]).reset_index(drop=True)
    )
