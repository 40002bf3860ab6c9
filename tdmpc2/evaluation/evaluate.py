"""Every mode on the same episodes: calibrate, run, measure, and write the evidence down.

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

A run that is killed goes on with the modes that are missing.
"""

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from ..agent import SpeculativeAgent
from ..checked import Checked, at_least
from ..config import SpeculationConfig
from ..corrector import BaseCorrector, read_header
from ..errors import ConfigError, TaskError
from ..files import atomic_write, difference, read_json, write_json
from ..monitor import calibrate_thresholds
from ..progress import Progress
from ..teacher import Teacher
from ..world_model import fingerprint
from .metrics import act_columns, act_times, by_step_in_plan, holds_up, summarise
from .modes import ALONE, BASELINE, DISTILLED, PRIOR, SIMPLER, families, simple_modes
from .report import in_terminal, verdict, write_report
from .rollout import Rollout, measure_latency, random_returns, rollout

REFINING_LOSS = 0.01  # of the return, that refining by a single step may cost
CLEARLY_FASTER = 0.8  # of the baseline's mean time of an action, that a chosen mode takes at most
ALIKE = 0.1  # relative difference of mean times that says nothing
LABELLER = 1_000_003  # added to the planner's seed, so that labels have noise of their own
PUSH = ("push", 0.3)  # of the weight of all that moves: what a chosen mode must withstand


@dataclass(frozen=True)
class EpisodesConfig(Checked):
    """Which episodes are evaluated."""

    episodes: int = 20  # per mode
    seed: int = 20_000  # the first of them; the others follow
    num_envs: int = 10  # episodes run as one batch

    def check_ranges(self) -> None:
        at_least(1, self, "episodes", "num_envs")
        at_least(0, self, "seed")

    @property
    def seeds(self) -> range:
        return range(self.seed, self.seed + self.episodes)


@dataclass(frozen=True)
class EvaluationConfig(EpisodesConfig):
    """How much is evaluated, on which seeds, and what a mode must hold to be chosen."""

    calibration_episodes: int = 30  # per mode
    calibration_seed: int = 10_000
    quantile: float = 0.9  # share of calibration plans whose mismatch stays below the thresholds
    label_episodes: int = 1  # per mode, of those that run at once: distance to the teacher is measured there
    latency_steps: int = 500  # per mode, from the first step of an episode on
    min_return: float = 0.98  # ratio to the baseline that a chosen mode must hold
    min_return_pushed: float = 0.95  # the same where both are pushed, on average

    def check_ranges(self) -> None:
        super().check_ranges()
        at_least(2, self, "calibration_episodes")  # a single one has no interval: no mode could be chosen
        at_least(1, self, "latency_steps")
        at_least(0, self, "calibration_seed")
        for name in ("quantile", "min_return", "min_return_pushed"):
            if not 0 < getattr(self, name) <= 1:
                raise ConfigError(f"{name}={getattr(self, name)}: must be above 0 and at most 1")
        if not 0 <= self.label_episodes <= min(self.num_envs, self.episodes):
            raise ConfigError(
                f"label_episodes={self.label_episodes}: these are among the episodes that run at once, at "
                f"most {min(self.num_envs, self.episodes)}"
            )
        if overlap(self.seeds, self.calibration_seeds):
            raise ConfigError(f"seed={self.seed}: evaluation seeds overlap the calibration seeds")

    @property
    def calibration_seeds(self) -> range:
        return range(self.calibration_seed, self.calibration_seed + self.calibration_episodes)


def overlap(a: range, b: range) -> bool:
    return max(a.start, b.start) < min(a.stop, b.stop)


def check_unseen(seeds: Iterable[int], correctors: Iterable[Path]) -> None:
    """Raise ConfigError where a corrector in one of these folders was trained on episodes of these seeds."""
    for folder in correctors:
        seen = set(read_header(folder).get("seeds", ()))  # correctors of earlier versions do not tell
        if seen.intersection(seeds):
            raise ConfigError(
                f"{folder} was trained on episodes with seeds of this evaluation: change evaluation.seed or "
                "evaluation.calibration_seed"
            )


class Choice(NamedTuple):
    """The mode that an agent comes with."""

    mode: str
    why: str  # in words
    more_data_may_help: bool = False


@dataclass(frozen=True)
class Subject:
    """What is evaluated: a teacher and its correctors."""

    teacher: Teacher
    correctors: Mapping[str, BaseCorrector]

    def agent(self, mode: SpeculationConfig, num_envs: int, seed: int) -> SpeculativeAgent:
        corrector = self.correctors[mode.corrector] if mode.corrector else None
        return SpeculativeAgent(self.teacher.agent(num_envs, seed), mode, corrector)

    def rollout(
        self,
        mode: SpeculationConfig,
        seeds: Sequence[int],
        num_envs: int,
        *,
        label_episodes: int = 0,
        on_step: Callable[[int], None] = lambda done: None,
    ) -> Rollout:
        """Episodes of `mode` on `seeds`; the planner's noise begins from the first of them."""
        n = min(num_envs, len(seeds))
        labelled = min(label_episodes, n)
        labeller = self.teacher.agent(labelled, seeds[0] + LABELLER) if labelled else None
        agent = self.agent(mode, n, seeds[0])
        return rollout(agent, self.teacher.env, seeds, labeller=labeller, on_step=on_step)


def calibrate(
    subject: Subject, config: EvaluationConfig, out: Path, progress: Progress
) -> dict[str, SpeculationConfig]:
    """All modes, the baseline first, with thresholds from episodes without fallback on the calibration seeds.

    One run of a family, at its longest execution horizon, holds the mismatches of the shorter ones: those at
    their steps in plan. Refining looks a single step ahead, or as far as plans do where a single step costs
    more than `REFINING_LOSS` of the mean return.
    """
    seeds = config.calibration_seeds
    modes = simple_modes(subject.teacher.planner.iterations)
    episodes: dict[str, pd.DataFrame] = {}
    for family in families(list(subject.correctors)):
        free = ALONE
        if family.horizons:
            free = SpeculationConfig(max(family.horizons), corrector=family.corrector)
        elif not family.refined:  # nothing to calibrate
            modes[DISTILLED] = ALONE
            continue
        runs = {}
        for n in dict.fromkeys([1, subject.teacher.planner.horizon]) if family.refined else [0]:
            name = family.name + (f"_{n}" if family.refined else "")
            mode = replace(free, refine_steps=n)
            runs[n] = _run_mode(subject, name, mode, config, seeds, out / "free", progress)
            episodes[name] = runs[n].episodes
        returns = {n: run.episodes["return"].mean() for n, run in runs.items()}
        most = max(returns.values())
        n = min(n for n in returns if returns[n] >= most - REFINING_LOSS * abs(most))
        if not family.horizons:
            modes[family.name] = replace(free, refine_steps=n)
        for horizon in family.horizons:
            modes[family.mode_name(horizon)] = replace(
                free,
                execution_horizon=horizon,
                refine_steps=n,
                threshold=calibrate_thresholds(runs[n].steps, config.quantile, horizon),
            )
    write_csv(out / "free" / "episodes.csv", _join(episodes))
    return {**modes, "prior": PRIOR}


def run_modes(
    subject: Subject,
    modes: Mapping[str, SpeculationConfig],
    config: EpisodesConfig,
    seeds: Sequence[int],
    out: Path,
    progress: Progress,
    label_episodes: int = 0,
) -> Rollout:
    """Episodes of every mode on the same seeds, in one table each, column `mode` in front.

    What `out` holds already is read back instead of run again.

    Args:
        subject: what is evaluated.
        modes: by name, the baseline first.
        config: number of environments.
        seeds: of the episodes.
        out: folder for the raw results, one folder a mode inside.
        progress: shows what is going on.
        label_episodes: the first so many episodes, of those that run at once, measure the distance to the
            teacher's action.
    """
    results = {
        name: _run_mode(subject, name, mode, config, seeds, out, progress, label_episodes)
        for name, mode in modes.items()
    }
    return Rollout(
        _join({name: r.episodes for name, r in results.items()}),
        _join({name: r.steps for name, r in results.items()}),
    )


def choose(
    subject: Subject,
    modes: Mapping[str, SpeculationConfig],
    latency: pd.DataFrame,
    config: EvaluationConfig,
    out: Path,
    progress: Progress,
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
        modes: from `calibrate`.
        latency: from `measure_latency`, of all modes.
        config: episodes, seeds and requirements.
        out: folder for the raw results.
        progress: shows what is going on.
    """
    tried, tried_pushed = ({BASELINE: modes[BASELINE]} for _ in range(2))
    baseline = _calibration_summary(subject, tried, latency, config, out / "modes", progress).iloc[0]
    random = _random_returns(subject, config, out / "random.csv")
    if fault := failure(baseline["return_mean"], random):
        prior = subject.rollout(PRIOR, config.calibration_seeds, config.num_envs).episodes["return"].mean()
        return Choice(BASELINE, f"{fault}; its policy prior reaches {prior:.1f}")
    pushed: Subject | None = None
    try:
        pushed = Subject(subject.teacher.perturbed(*PUSH), subject.correctors)
        under_pushes = f", and {config.min_return_pushed} of it under pushes"
    except TaskError as e:
        progress.print(f"{e}; the mode is chosen without pushes")
        under_pushes = "; the task cannot be perturbed, so the mode was not tried under pushes"
    limit = CLEARLY_FASTER * baseline["act_ms_mean"]
    fastest = {  # without fallbacks
        name: act_columns(*act_times(latency, name, 1 / mode.execution_horizon))["act_ms_mean"]
        for name, mode in modes.items()
        if name not in SIMPLER and name != BASELINE
    }
    best, least, lower = "", limit, -math.inf
    held: list[str] = []
    for name in sorted(fastest, key=fastest.__getitem__):
        if fastest[name] >= (1 + ALIKE) * least:
            break
        tried[name] = modes[name]
        pair = {BASELINE: modes[BASELINE], name: modes[name]}
        summary = _calibration_summary(subject, pair, latency, config, out / "modes", progress)
        row = summary.iloc[-1]
        time, low = row["act_ms_mean"], row["return_difference_low"]
        better = time < limit and (time < (1 - ALIKE) * least or (time < (1 + ALIKE) * least and low > lower))
        if not (better and holds_up(summary, config.min_return).iloc[-1]):
            continue
        held.append(name)
        if pushed is not None:
            tried_pushed[name] = modes[name]
            summary = _calibration_summary(pushed, pair, latency, config, out / "pushed", progress)
            reference, own = summary["return_mean"]
            if not reference - own <= (1 - config.min_return_pushed) * abs(reference):
                continue
        best, least, lower = name, min(time, least), low
    _calibration_summary(subject, tried, latency, config, out / "modes", progress)
    if pushed is not None:
        _calibration_summary(pushed, tried_pushed, latency, config, out / "pushed", progress)
    if best:
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


def _random_returns(subject: Subject, config: EvaluationConfig, path: Path) -> np.ndarray:
    """Returns of random actions on the calibration seeds, read back where an earlier run left them."""
    if not path.exists():
        seeds = config.calibration_seeds
        returns = random_returns(subject.teacher.env, seeds)
        write_csv(path, pd.DataFrame({"seed": seeds, "return": returns}))
    return pd.read_csv(path)["return"].to_numpy()


def _calibration_summary(
    subject: Subject,
    modes: Mapping[str, SpeculationConfig],
    latency: pd.DataFrame,
    config: EvaluationConfig,
    out: Path,
    progress: Progress,
) -> pd.DataFrame:
    """Modes on the calibration seeds, together in `out/episodes.csv`, summed up in `out/summary.csv`."""
    result = run_modes(subject, modes, config, config.calibration_seeds, out, progress)
    write_csv(out / "episodes.csv", result.episodes)
    summary = summarise(result.episodes, result.steps, latency)
    write_csv(out / "summary.csv", summary)
    return summary


def evaluate(
    subject: Subject,
    config: EvaluationConfig,
    out: Path,
    meta: Mapping[str, Any],
    progress: Progress,
) -> Choice:
    """Calibrate, choose a mode, run all modes on held-out seeds, and write results and report to `out`.

    Args:
        subject: what is evaluated.
        config: episodes and seeds.
        out: the folder for the results.
        meta: what the report says of where the numbers come from, `commit` among it.
        progress: shows what is going on, and the table.

    Returns:
        The chosen mode; `out/chosen.json` holds its settings.

    Raises:
        ConfigError: the seeds overlap, or `out` holds an evaluation with other settings.
    """
    seeds = config.seeds
    settings = {
        "task": subject.teacher.task,
        "teacher": subject.teacher.fingerprint,
        "correctors": {name: fingerprint(c) for name, c in subject.correctors.items()},
        "planner": asdict(subject.teacher.planner),
        "precision": subject.teacher.compute.precision,
        "evaluation": asdict(config),
    }
    claim(out, settings)
    written_by = out / "commits.json"
    commits = dict.fromkeys([*(read_json(written_by) if written_by.exists() else []), meta["commit"]])
    write_json(written_by, [*commits])
    modes = calibrate(subject, config, out / "calibration", progress)
    latency = _latency(subject, modes, config, out / "latency.csv", progress)
    choice = choose(subject, modes, latency, config, out / "calibration", progress)
    chosen, why = choice.mode, choice.why
    about = {"mode": chosen, "why": why, "speculation": asdict(modes[chosen])}
    write_json(out / "chosen.json", about)
    episodes, steps = run_modes(subject, modes, config, seeds, out / "modes", progress, config.label_episodes)
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
        **meta,
        **settings,
        "commit": ", ".join(commits),
        "chosen": chosen,
        "why": why,
        "min_return": config.min_return,
        "min_return_pushed": config.min_return_pushed,
        "seeds": f"{seeds[0]} to {seeds[-1]}",
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


def _run_mode(
    subject: Subject,
    name: str,
    mode: SpeculationConfig,
    config: EpisodesConfig,
    seeds: Sequence[int],
    out: Path,
    progress: Progress,
    label_episodes: int = 0,
) -> Rollout:
    """Episodes of one mode, read back where an earlier run left them."""
    folder = out / name
    if _same_settings(folder / "settings.json", asdict(mode)):
        return Rollout(*(pd.read_csv(folder / f"{name}.csv") for name in Rollout._fields))
    with progress.add(name, unit="steps") as stage:

        def show(ended: int) -> None:
            stage.advance()
            stage.note(f"{ended} of {len(seeds)} episodes")

        result = subject.rollout(mode, seeds, config.num_envs, label_episodes=label_episodes, on_step=show)
    folder.mkdir(parents=True, exist_ok=True)
    write_csv(folder / "episodes.csv", result.episodes)
    write_csv(folder / "steps.csv", result.steps)
    write_json(folder / "settings.json", asdict(mode))
    return result


def _latency(
    subject: Subject,
    modes: Mapping[str, SpeculationConfig],
    config: EvaluationConfig,
    path: Path,
    progress: Progress,
) -> pd.DataFrame:
    """Times of single steps on a calibration seed, read back where an earlier run left them."""
    if not path.exists():
        progress.print("measuring the time of single steps, all modes in turn")
        seed = config.calibration_seeds[0]
        agents = {name: subject.agent(mode, 1, seed) for name, mode in modes.items()}
        write_csv(path, measure_latency(agents, subject.teacher.env, seed, config.latency_steps))
    return pd.read_csv(path)


def claim(out: Path, settings: dict[str, Any], free: Collection[str] = ()) -> None:
    """Make `out` the folder of results with these settings; ConfigError where others than `free` differ."""
    if not _same_settings(out / "settings.json", settings, free):
        write_json(out / "settings.json", settings)


def _same_settings(path: Path, settings: dict[str, Any], free: Collection[str] = ()) -> bool:
    """Whether `path` holds these settings; False where there is no such file."""
    if not path.exists():
        return False
    if differs := difference(read_json(path), settings, free):
        raise ConfigError(f"{path} was written with {differs}: choose another out=, or delete it")
    return True


def _join(tables: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """Tables of the modes under one another, the mode's name in front."""
    named = [table.assign(mode=name) for name, table in tables.items()]
    joined = pd.concat(named, ignore_index=True)
    return joined[["mode", *(c for c in joined.columns if c != "mode")]]


def write_csv(path: Path, table: pd.DataFrame) -> None:
    with atomic_write(path) as tmp:
        table.to_csv(tmp, index=False)
