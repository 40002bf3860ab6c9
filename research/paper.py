"""The published modes, corrected and not refined, beside the same modes refined; for both losses.

    python research/paper.py task=walker-walk checkpoint=pretrained/walker-walk \\
        data=accelerated/walker-walk/data

Both correctors are trained anew on an agent's data with the squared and with the absolute loss, equally long.
Thresholds are calibrated on seeds of their own; then all modes run the same held-out episodes. Writes
`results/paper/TASK/episodes.csv`, `summary.csv` and `provenance.json`. A run that is killed goes on with the
correctors and modes that are missing.
"""

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from calibrated import Calibrated
from rich.console import Console

from tdmpc2 import cli
from tdmpc2.checked import at_least
from tdmpc2.config import BudgetOverride, ModelOverride, SpeculationConfig
from tdmpc2.corrector import BaseCorrector, load_corrector
from tdmpc2.distillation import CorrectorTrainConfig, load_shards, train_corrector
from tdmpc2.distillation.losses import LOSSES
from tdmpc2.evaluation.config import EpisodesConfig, EvaluationConfig, check_unseen
from tdmpc2.evaluation.metrics import summarise
from tdmpc2.evaluation.modes import PAPER_HORIZONS, Family, simple_modes
from tdmpc2.evaluation.runs import Subject, claim, execute, kept, runs_of, write_csv
from tdmpc2.files import in_use, write_json
from tdmpc2.monitor import calibrate_thresholds
from tdmpc2.progress import Progress
from tdmpc2.provenance import provenance
from tdmpc2.teacher import open_teacher
from tdmpc2.workers import Workers

CORRECTORS = ("two_tower", "temporal")
# Settings that may change on resume.
FREE_ON_RESUME = ("checkpoint", "data", "device", "workers", "planner.compile", "runs", "out")


@dataclass(frozen=True, kw_only=True)
class PaperConfig(Calibrated):
    """Whose data the correctors are trained on, and how much is evaluated."""

    task: str
    checkpoint: str  # the teacher
    data: str  # a folder of shards that it labelled
    device: str = "cpu"
    workers: int = 0  # processes with one thread each; 0: one per core, on a GPU one in all
    updates: int = 1_400  # of each corrector: as many as `tdmpc2 accelerate` makes in all its rounds
    runs: str = "runs/paper"  # for what is not published
    out: str = "results/paper"
    planner: BudgetOverride = field(default_factory=BudgetOverride)
    model: ModelOverride = field(default_factory=ModelOverride)
    evaluation: EpisodesConfig = field(default_factory=lambda: EpisodesConfig(num_envs=20))

    def check_ranges(self) -> None:
        super().check_ranges()
        at_least(1, self, "updates")


def main(config: PaperConfig) -> None:
    with Progress(Console()) as progress, in_use(Path(config.runs) / config.task):
        compare(config, Workers.of(config.workers, config.device, progress))


def compare(config: PaperConfig, workers: Workers) -> None:
    """Train what is missing, evaluate, and write the results."""
    teacher = open_teacher(config.task, config.checkpoint, config.planner, config.model, config.device)
    runs, out = Path(config.runs) / config.task, Path(config.out) / config.task
    seeds = config.calibration_seeds
    data = load_shards(config.data, teacher.fingerprint).to(config.device)
    settings = {
        **asdict(config),
        "teacher": teacher.fingerprint,
        "budget": asdict(teacher.planner),
        "precision": teacher.precision,
        "episodes of the data": sorted(data.seed.unique().tolist()),
    }
    claim(runs, settings, FREE_ON_RESUME)
    correctors: dict[str, BaseCorrector] = {}
    for loss in LOSSES:
        for name in CORRECTORS:
            folder = runs / "correctors" / loss
            if not (folder / name / "done").exists():
                how = CorrectorTrainConfig(architecture=name, loss=loss, updates=config.updates)
                train_corrector(teacher.model, data, how, folder)
                (folder / name / "done").touch()
            correctors[f"{name}, {loss}"] = load_corrector(folder / name, teacher.fingerprint, config.device)
            check_unseen([*seeds, *config.evaluation.seeds], [folder / name])
    subject = Subject(teacher, correctors)
    quantile, far = EvaluationConfig.quantile, max(PAPER_HORIZONS)
    modes = simple_modes(teacher.planner.iterations)
    del modes["half_budget"]
    for corrector in correctors:
        name, loss = corrector.split(", ")
        for refined in (False, True):
            family = Family(name, refined)
            # Refining looks as far ahead as plans do: a single step is not enough on every task.
            steps = teacher.planner.horizon if refined else 0
            free = SpeculationConfig(far, corrector=corrector, refine_steps=steps)
            mode = f"{family.name}-{loss}"
            calibration = runs_of(
                subject, {mode: free}, seeds, config.evaluation.num_envs, runs / "calibration"
            )
            execute(calibration, "calibration", workers)
            for k in PAPER_HORIZONS:
                modes[f"{family.mode_name(k)}, {loss}"] = replace(
                    free,
                    execution_horizon=k,
                    threshold=calibrate_thresholds(calibration[mode].kept().steps, quantile, k),
                )
    held_out = config.evaluation
    every = runs_of(subject, modes, held_out.seeds, held_out.num_envs, runs / "modes")
    execute(every, "all modes", workers)
    result = kept(every)
    write_csv(out / "episodes.csv", result.episodes)
    write_csv(out / "summary.csv", summarise(result.episodes, result.steps, None))
    about = {
        **provenance(),
        "config": asdict(config),
        "teacher": teacher.fingerprint,
        "planner": asdict(teacher.planner),
        "precision": teacher.precision,
        "modes": {name: asdict(mode) for name, mode in modes.items()},
    }
    write_json(out / "provenance.json", about)


if __name__ == "__main__":
    cli.run(PaperConfig, main)
