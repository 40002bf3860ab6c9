"""The choice of the mode that an agent comes with."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from ..config import SpeculationConfig
from ..workers import Workers
from .config import EvaluationConfig
from .metrics import act_columns, act_times, holds_up, summarise
from .modes import BASELINE, PRIOR, SIMPLER
from .runs import Subject, execute, kept, returns_of_random_actions, runs_of, write_csv

CLEARLY_FASTER = 0.8  # of the baseline's mean time of an action, that a chosen mode takes at most
ALIKE = 0.1  # relative difference of mean times that says nothing
AT_ONCE = 4  # modes that run on the calibration seeds together, to keep several processes busy
PUSH = ("push", 0.3)  # of the weight of all that moves: what a chosen mode must withstand


@dataclass(frozen=True)
class Choice:
    """The mode that an agent comes with."""

    mode: str
    why: str  # in words
    more_data_may_help: bool = False


def choose(
    subject: Subject,
    pushed: Subject | None,
    modes: Mapping[str, SpeculationConfig],
    latency: pd.DataFrame,
    config: EvaluationConfig,
    out: Path,
    workers: Workers,
) -> Choice:
    """The mode with the least mean time of an action that holds up on the calibration seeds, none of SIMPLER.

    A mode holds up where the lower end of its return ratio is at least `min_return`. Where the task can be
    perturbed, its mean return under pushes is at least `min_return_pushed` of the baseline's there. It is
    clearly faster than the baseline. Times that differ by less than `ALIKE` count as equal: then the mode
    whose return has the higher lower end is chosen. Modes are tried from the fastest on, as they are without
    fallbacks, until none that is left can be the fastest. Where the teacher does no better than random
    actions, nothing is chosen.

    Args:
        subject: what is evaluated.
        pushed: the same in the perturbed world, see `under_pushes`.
        modes: from `calibrate`.
        latency: from `measure_latency`, of all modes.
        config: episodes, seeds and requirements.
        out: folder of the results.
        workers: run the episodes.
    """
    tried, tried_pushed = ({BASELINE: modes[BASELINE]} for _ in range(2))

    def summary_of(subject: Subject, modes: Mapping[str, SpeculationConfig], folder: str) -> pd.DataFrame:
        return calibration_summary(subject, modes, latency, config, out / folder, workers)

    baseline = summary_of(subject, tried, "modes").iloc[0]
    random = returns_of_random_actions(subject.teacher, config.calibration_seeds, out / "random.csv")
    if fault := failure(baseline["return_mean"], random):
        prior = subject.rollout(PRIOR, config.calibration_seeds, config.num_envs).episodes["return"].mean()
        return Choice(BASELINE, f"{fault}; its policy prior reaches {prior:.1f}")
    limit = CLEARLY_FASTER * baseline["act_ms_mean"]
    fastest = {  # without fallbacks
        name: act_columns(*act_times(latency, name, 1 / mode.execution_horizon))["act_ms_mean"]
        for name, mode in modes.items()
        if name not in SIMPLER and name != BASELINE
    }
    best, least, lower = "", limit, -math.inf
    held: list[str] = []
    ranked = sorted(fastest, key=fastest.__getitem__)
    for i, name in enumerate(ranked):
        if fastest[name] >= (1 + ALIKE) * least:
            break
        if i % AT_ONCE == 0:
            ahead = {n: modes[n] for n in ranked[i : i + AT_ONCE] if fastest[n] < (1 + ALIKE) * least}
            runs = runs_of(subject, ahead, config.calibration_seeds, config.num_envs, out / "modes")
            execute(runs, "calibration", workers)
        tried[name] = modes[name]
        pair = {BASELINE: modes[BASELINE], name: modes[name]}
        summary = summary_of(subject, pair, "modes")
        row = summary.iloc[-1]
        time, low = row["act_ms_mean"], row["return_difference_low"]
        better = time < limit and (time < (1 - ALIKE) * least or (time < (1 + ALIKE) * least and low > lower))
        if not (better and holds_up(summary, config.min_return).iloc[-1]):
            continue
        held.append(name)
        if pushed is not None:
            tried_pushed[name] = modes[name]
            reference, own = summary_of(pushed, pair, "pushed")["return_mean"]
            if not reference - own <= (1 - config.min_return_pushed) * abs(reference):
                continue
        best, least, lower = name, min(time, least), low
    summary_of(subject, tried, "modes")
    if pushed is not None:
        summary_of(pushed, tried_pushed, "pushed")
    if best:
        under_pushes = (
            f", and {config.min_return_pushed} of it under pushes"
            if pushed is not None
            else "; the mode was not tried under pushes"
        )
        return Choice(
            best,
            f"it takes the least time of all modes that hold {config.min_return} of the return{under_pushes}",
        )
    if not held:
        return Choice(
            BASELINE,
            f"no mode that speculates holds {config.min_return} of the return in less than "
            f"{CLEARLY_FASTER} of the time",
            more_data_may_help=True,
        )
    return Choice(
        BASELINE,
        f"of the modes that hold {config.min_return} of the return ({', '.join(held)}) none "
        f"keeps {config.min_return_pushed} of it under pushes",
        more_data_may_help=True,
    )


def under_pushes(subject: Subject) -> Subject:
    """The same in a world that pushes by `PUSH`; TaskError where the task's world cannot be perturbed."""
    return Subject(subject.teacher.perturbed(*PUSH), subject.correctors)


def failure(mean_return: float, random: np.ndarray) -> str:
    """What is wrong with a teacher that is no better than random actions, in words; "" where it is.

    Args:
        mean_return: of the teacher.
        random: `[n]`, returns of random actions on the same seeds.
    """
    if mean_return > random.mean() + random.std() / len(random) ** 0.5:
        return ""
    return (
        f"the teacher itself fails: its mean return is {mean_return:.1f}, random actions reach "
        f"{random.mean():.1f}; check the task, the order and scaling of observations, and the action repeat"
    )


def calibration_summary(
    subject: Subject,
    modes: Mapping[str, SpeculationConfig],
    latency: pd.DataFrame,
    config: EvaluationConfig,
    out: Path,
    workers: Workers,
) -> pd.DataFrame:
    """Modes on the calibration seeds, together in `out/episodes.csv`, summed up in `out/summary.csv`."""
    runs = runs_of(subject, modes, config.calibration_seeds, config.num_envs, out)
    execute(runs, "calibration", workers)
    result = kept(runs)
    write_csv(out / "episodes.csv", result.episodes)
    summary = summarise(result.episodes, result.steps, latency)
    write_csv(out / "summary.csv", summary)
    return summary
