"""Every mode on the same episodes: calibrate, measure, choose, run, and write the evidence down.

    OUT/calibration/free/NAME/           execution without fallback, for the thresholds
    OUT/latency.csv                      times of single steps of all modes
    OUT/calibration/random.csv           returns of random actions
    OUT/calibration/modes/NAME/          the modes that were tried, on the calibration seeds
    OUT/calibration/pushed/NAME/         those that were tried under pushes, on the same seeds
    OUT/calibration/*/episodes.csv       all of these together, and for the last two summary.csv
    OUT/modes/NAME/                      all modes on the held-out seeds: episodes.csv, steps.csv
    OUT/episodes.csv, steps.csv, by_step_in_plan.csv, summary.csv, report.html     all of these together
    OUT/chosen.json                      the mode that was chosen
    OUT/commits.json                     of the code that wrote any of it

A killed run continues with the missing modes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..errors import TaskError
from ..files import read_json, write_json
from ..provenance import provenance
from ..workers import Workers
from ..world_model import fingerprint
from .calibrate import calibrate
from .choose import Choice, choose, under_pushes
from .config import EvaluationConfig
from .metrics import by_step_in_plan, summarise
from .modes import BASELINE
from .report import in_terminal, verdict, write_report
from .runs import Run, Subject, claim, execute, kept, latency_of, runs_of, write_csv


@dataclass(frozen=True)
class Origin:
    """How the evaluated correctors were made, for the report."""

    validation: Sequence[Mapping[str, Any]]  # one row a corrector: corrector, error, plan_error, prior_error
    trained: str = ""  # commits, machines and devices of data and training
    settings: Mapping[str, Any] = field(default_factory=dict)  # of the whole job


def evaluate(
    subject: Subject, config: EvaluationConfig, out: Path, origin: Origin, workers: Workers
) -> Choice:
    """Calibrate, choose a mode, run all modes on held-out seeds, and write results and report to `out`.

    Args:
        subject: what is evaluated.
        config: episodes and seeds.
        out: the folder for the results.
        origin: how its correctors were made.
        workers: run the episodes.

    Returns:
        The chosen mode; `out/chosen.json` holds its settings.

    Raises:
        ConfigError: the seeds overlap, or `out` holds an evaluation with other settings.
    """
    progress = workers.progress
    settings = {
        "task": subject.teacher.task,
        "teacher": subject.teacher.fingerprint,
        "correctors": {name: fingerprint(c) for name, c in subject.correctors.items()},
        "planner": asdict(subject.teacher.planner),
        "precision": subject.teacher.precision,
        "evaluation": asdict(config),
    }
    claim(out, settings)
    written_by, made = out / "commits.json", provenance()
    commits = dict.fromkeys([*(read_json(written_by) if written_by.exists() else []), made["commit"]])
    write_json(written_by, [*commits])
    calibration = out / "calibration"
    modes = calibrate(subject, config, calibration, workers)
    latency = latency_of(
        subject, modes, config.calibration_seed, config.latency_steps, out / "latency.csv", workers
    )
    pushed: Subject | None = None
    try:
        pushed = under_pushes(subject) if config.min_return_pushed else None
    except TaskError as e:
        progress.print(f"{e}; the mode is chosen without pushes")
    # What does not depend on the choice runs at once, which keeps all processes busy.
    held_out = runs_of(subject, modes, config.seeds, config.num_envs, out / "modes", config.label_episodes)
    at_once: dict[str, Run] = {}
    for name, world in {"modes": subject, "pushed": pushed}.items():
        if world is not None:
            folder = calibration / name / BASELINE
            own = Run(world, modes[BASELINE], config.calibration_seeds, config.num_envs, folder)
            at_once[f"{BASELINE} in calibration/{name}"] = own
    execute({**at_once, **held_out}, "all modes", workers)  # the longest first
    choice = choose(subject, pushed, modes, latency, config, calibration, workers)
    about = {"mode": choice.mode, "why": choice.why, "speculation": asdict(modes[choice.mode])}
    write_json(out / "chosen.json", about)
    episodes, steps = kept(held_out)
    summary = summarise(episodes, steps, latency)
    tables = {
        "episodes": episodes,
        "steps": steps,
        "summary": summary,
        "by_step_in_plan": by_step_in_plan(steps),
    }
    for name, table in tables.items():
        write_csv(out / f"{name}.csv", table)
    provided = {
        **made,
        **asdict(origin),
        **settings,
        "commit": ", ".join(commits),
        "chosen": choice.mode,
        "why": choice.why,
        "min_return": config.min_return,
        "min_return_pushed": config.min_return_pushed,
        "seeds": f"{config.seeds[0]} to {config.seeds[-1]}",
        "calibration_seeds": f"{config.calibration_seeds[0]} to {config.calibration_seeds[-1]}",
        "modes": {name: asdict(mode) for name, mode in modes.items()},
    }
    write_json(out / "provenance.json", provided)
    report = write_report(out)
    progress.table(in_terminal(summary))
    for sentence in verdict(summary, provided)[:2]:
        progress.print(sentence)
    progress.print(f"The report says why and where it fails: {report}")
    return choice
