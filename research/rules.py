"""Which rule gives plans up best: planner calls and return, as modelled and in perturbed worlds.

    python research/rules.py task=walker-walk checkpoint=pretrained/walker-walk \\
        correctors=accelerated/walker-walk/correctors

The corrector executes 24 steps of each plan, refined. Rules are calibrated on episodes without fallback. All
rules and the baseline run the same episodes in every world. Writes `results/rules/TASK.csv`, a row an
episode, and `TASK.json`, where the numbers come from.
"""

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import pandas as pd
from calibrated import Calibrated
from rich.console import Console

from tdmpc2 import cli
from tdmpc2.checked import at_least
from tdmpc2.config import TEACHER, BudgetOverride, ModelOverride, SpeculationConfig
from tdmpc2.corrector import load_corrector
from tdmpc2.errors import TaskError
from tdmpc2.evaluation.config import EpisodesConfig, check_unseen
from tdmpc2.evaluation.modes import BASELINE
from tdmpc2.evaluation.runs import Subject, write_csv
from tdmpc2.files import write_json
from tdmpc2.monitor import calibrate_thresholds
from tdmpc2.provenance import provenance
from tdmpc2.teacher import open_teacher

PER_STEP = 0.97  # the first edition's quantile of the mismatches at every step in plan
PER_PLAN = (0.9, 0.97)  # shares of calibration plans whose mismatch stays below the thresholds
WORLDS = {
    "as modelled": None,
    "push 0.3": ("push", 0.3),
    "mass 1.3": ("mass", 1.3),
}


@dataclass(frozen=True, kw_only=True)
class RulesConfig(Calibrated):
    """Which corrector the rules are compared on."""

    task: str
    checkpoint: str  # the teacher
    correctors: str  # a folder of correctors
    device: str = "cpu"
    architecture: str = "two_tower"
    execution_horizon: int = 24
    out: str = "results/rules"
    planner: BudgetOverride = field(default_factory=BudgetOverride)
    model: ModelOverride = field(default_factory=ModelOverride)
    evaluation: EpisodesConfig = field(default_factory=lambda: EpisodesConfig(seed=40_000, num_envs=20))

    def check_ranges(self) -> None:
        super().check_ranges()
        at_least(1, self, "execution_horizon")


def rules(free: SpeculationConfig, steps: pd.DataFrame) -> dict[str, SpeculationConfig]:
    """The rules to compare, calibrated on `steps` of episodes that `free` executed without fallback."""
    horizon = free.execution_horizon
    later = steps[steps["k"] > 0]
    per_step = tuple(later.groupby("k")["mismatch"].quantile(PER_STEP))
    thresholds = {f"per step {PER_STEP}": per_step}
    for quantile in PER_PLAN:
        thresholds[f"per plan {quantile}"] = calibrate_thresholds(steps, quantile, horizon)
    table = {name: replace(free, threshold=threshold) for name, threshold in thresholds.items()}
    return {"no fallback": free, **table}


def main(config: RulesConfig) -> None:
    console, name = Console(), config.architecture
    seeds, held_out = config.calibration_seeds, config.evaluation
    teacher = open_teacher(config.task, config.checkpoint, config.planner, config.model, config.device)
    corrector = load_corrector(Path(config.correctors) / name, teacher.fingerprint, config.device)
    steps_ahead = teacher.planner.horizon
    free = SpeculationConfig(config.execution_horizon, corrector=name, refine_steps=steps_ahead)
    check_unseen([*seeds, *held_out.seeds], [Path(config.correctors) / name])
    steps = Subject(teacher, {name: corrector}).rollout(free, seeds, held_out.num_envs).steps
    compared = {BASELINE: TEACHER, **rules(free, steps)}
    tables = []
    for world, perturbation in WORLDS.items():
        try:
            own = teacher if perturbation is None else teacher.perturbed(*perturbation)
        except TaskError as e:
            console.print(f"without {world}: {e}")
            continue
        subject = Subject(own, {name: corrector})
        for rule, compared_mode in compared.items():
            episodes = subject.rollout(compared_mode, held_out.seeds, held_out.num_envs).episodes
            tables.append(episodes.assign(world=world, rule=rule))
            calls = episodes["planner_calls"].sum() / episodes["length"].sum()
            console.print(
                f"{world:24} {rule:28} {episodes['return'].mean():8.1f}  {calls:6.1%} planner calls"
            )
    out = Path(config.out) / teacher.task
    write_csv(out.with_suffix(".csv"), pd.concat(tables))
    write_json(
        out.with_suffix(".json"),
        {
            **provenance(),
            "teacher": teacher.fingerprint,
            "planner": asdict(teacher.planner),
            "precision": teacher.precision,
            "config": asdict(config),
            "rules": {rule: asdict(m) for rule, m in compared.items()},
        },
    )


if __name__ == "__main__":
    cli.run(RulesConfig, main)
