"""The main job: a TD-MPC2 checkpoint and a task in, an accelerated agent and the evidence for it out.

    OUT/settings.json       the settings; a run continues only with the same ones, or with more rounds
    OUT/data/               shards: the teacher's own episodes, then those of each round
    OUT/rounds/N/           correctors trained on what there was before round N
    OUT/correctors/         the final ones; in each of these folders provenance.json says where it was made
    OUT/evaluation/         raw results, summary and report
    OUT/config.json, model.safetensors     the agent that `tdmpc2.load_agent(OUT)` opens

Correctors fail by leaving the states that they were trained on. So data is collected in rounds: agents with
the current correctors act, the teacher labels every state, and training continues on all data (DAgger, Ross
et al. 2011). It is short before a round, because more data follows, and complete after the last round. Some
actions are replaced by random ones, so that correctors learn to recover.

A killed run continues where it stopped: each step leaves whole files and is not repeated. It may continue on
another device: collect and train on a GPU, and measure where the agent will act. A run may also continue with
more rounds: its final correctors start the next round, and keep their evaluation beside them.
"""

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .agent import SpeculativeAgent
from .checked import Checked, at_least
from .config import TEACHER, BudgetOverride, ModelOverride, SpeculationConfig
from .corrector import ARCHITECTURES, FILE, BaseCorrector, build_corrector, load_corrector, read_header
from .distillation import (
    CorrectorTrainConfig,
    collect,
    episode_returns,
    error_table,
    load_shards,
    train_corrector,
)
from .envs import max_episode_steps
from .errors import CheckpointError, ConfigError
from .evaluation.choose import Choice, failure
from .evaluation.config import EvaluationConfig, check_unseen, overlap
from .evaluation.evaluate import Origin, evaluate
from .evaluation.modes import ALONE, DISTILLED, OPEN_LOOP_HORIZONS, families
from .evaluation.runs import Subject, returns_of_random_actions
from .files import atomic_write, difference, file_name, in_order, in_use, read_json, write_json
from .planner import Plan
from .progress import Progress
from .provenance import provenance
from .teacher import Teacher, open_teacher
from .workers import Workers
from .world_model import fingerprint, save_world_model
from .world_model.checkpoint import CONFIG

# Settings that may change on resume; the teacher is known by its weights.
FREE_ON_RESUME = ("checkpoint", "out", "device", "workers", "planner.compile")


@dataclass(frozen=True)
class DataConfig(Checked):
    """The episodes that correctors learn from."""

    episodes: int = 8  # of the teacher; at least 3, for training, validation and test
    round_episodes: int = 9  # one for each of two correctors and four execution horizons, one of `distilled`
    seed: int = 0  # of the first episode of all
    num_envs: int = 1  # episodes run as one batch, which makes one shard; give 10 on a GPU

    def check_ranges(self) -> None:
        at_least(3, self, "episodes")
        at_least(1, self, "round_episodes", "num_envs")
        at_least(0, self, "seed")


@dataclass(frozen=True, kw_only=True)
class AccelerateConfig(Checked):
    """What is accelerated, where, and how long."""

    task: str
    checkpoint: str  # an original .pt file or a folder of ours
    out: str = ""  # default: accelerated/<task>
    device: str = "cpu"
    workers: int = 0  # processes with one thread each; 0: one per core, on a GPU one in all
    rounds: int = 4  # of data under the correctors
    round_updates: int = 200  # in training before a round; distillation.updates are of the final training
    data: DataConfig = field(default_factory=DataConfig)
    planner: BudgetOverride = field(default_factory=BudgetOverride)
    model: ModelOverride = field(default_factory=ModelOverride)
    distillation: CorrectorTrainConfig = field(default_factory=CorrectorTrainConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    def check_ranges(self) -> None:
        if self.distillation.architecture == DISTILLED:
            raise ConfigError(f"distillation.architecture={DISTILLED}: it corrects nothing, choose another")
        at_least(0, self, "rounds", "workers")
        at_least(1, self, "round_updates")
        seed, own = self.data.seed, self.evaluation
        collected = range(seed, seed + self.data.episodes + self.rounds * self.data.round_episodes)
        if overlap(collected, own.calibration_seeds) or overlap(collected, own.seeds):
            raise ConfigError(f"data.seed={seed}: these seeds overlap those of calibration or evaluation")


def accelerate(config: AccelerateConfig, progress: Progress) -> Path:
    """Collect, train both correctors, calibrate, choose, evaluate, report; returns the agent's folder.

    Raises:
        ConfigError: a setting is invalid, seeds overlap, another process uses the folder, or it holds a run
            with other settings.
        CheckpointError, DataError, TaskError: the checkpoint, the data or the task cannot be used.
        FileError: the folder cannot be written.
    """
    out = Path(config.out or f"accelerated/{file_name(config.task)}")
    check_room_for_agent(out, config.checkpoint)
    teacher = open_teacher(config.task, config.checkpoint, config.planner, config.model, config.device)
    teacher.agent()  # refuses an invalid planning budget or precision
    workers = Workers.of(config.workers, config.device, progress)
    with in_use(out):
        return _accelerate(config, teacher, out, workers)


def _accelerate(config: AccelerateConfig, teacher: Teacher, out: Path, workers: Workers) -> Path:
    c, progress = config, workers.progress
    settings = {**asdict(c), "teacher": teacher.fingerprint}
    if (out / "settings.json").exists():
        earlier = read_json(out / "settings.json")
        rounds = earlier.get("rounds", 0)
        added = ("rounds",) if rounds <= c.rounds else ()  # only more can be
        if differs := difference(earlier, settings, (*FREE_ON_RESUME, *added)):
            raise ConfigError(f"{out} holds a run with {differs}: choose another out=, or delete it")
        if rounds < c.rounds:
            _make_room(out, rounds)
    else:
        progress.print(_expected_time(c, teacher, workers))
    write_json(out / "settings.json", settings)
    made_by = {**provenance(), "device": c.device}

    def gather(
        folder: str,
        first: int,
        episodes: int,
        behaviours: Sequence[SpeculationConfig] = (TEACHER,),
        correctors: Mapping[str, BaseCorrector] | None = None,
    ) -> None:
        if not any((out / "data" / folder).glob("shard-*")):
            write_json(out / "data" / folder / "provenance.json", made_by)
        collect(
            teacher,
            out / "data" / folder,
            episodes=episodes,
            seed=first,
            num_envs=c.data.num_envs,
            behaviours=behaviours,
            correctors=correctors,
            bursts=correctors is not None,
            workers=workers,
        )

    def train(folder: Path, initial: Mapping[str, BaseCorrector], updates: int) -> dict[str, BaseCorrector]:
        if not (folder / "done.json").exists():
            data = load_shards(out / "data", teacher.fingerprint).to(c.device)
            how = replace(c.distillation, updates=updates)
            trained = train_corrector(teacher.model, data, how, folder, initial, progress)
            progress.table(error_table(trained))
            write_json(folder / "provenance.json", made_by)
            write_json(folder / "done.json", {name: t.errors._asdict() for name, t in trained.items()})
        names = read_json(folder / "done.json")
        return {n: load_corrector(folder / n, teacher.fingerprint, c.device) for n in names}

    progress.print(f"{c.task}: the teacher's own episodes")
    gather("teacher", c.data.seed, c.data.episodes)
    returns = episode_returns(out / "data" / "teacher")
    seeds = range(c.data.seed, c.data.seed + c.data.episodes)
    random = returns_of_random_actions(teacher, seeds, out / "data" / "random.csv")
    if fault := failure(float(returns.mean()), random):
        progress.print(f"WARNING: {fault}; nothing will be chosen")
    correctors: dict[str, BaseCorrector] = {}
    for r in range(c.rounds):
        progress.print(f"round {r + 1} of {c.rounds}: episodes under the correctors so far")
        correctors = train(out / "rounds" / str(r + 1), correctors, c.round_updates)
        behaviours = [
            SpeculationConfig(execution_horizon=horizon, corrector=n)
            for horizon in sorted(c.evaluation.horizons, reverse=True)
            for n in correctors
            if n != DISTILLED
        ]
        if DISTILLED in correctors:  # a rival learns from its own states too
            behaviours.append(ALONE)
        first = c.data.seed + c.data.episodes + r * c.data.round_episodes
        gather(f"round-{r + 1}", first, c.data.round_episodes, behaviours, correctors)
    progress.print("the final correctors")
    train(out / "correctors", correctors, c.distillation.updates)
    choice = evaluate_correctors(
        teacher, out / "correctors", out / "evaluation", c.evaluation, workers, _where_made(out), settings
    )
    if choice.more_data_may_help:
        rounds = 2 * c.rounds or AccelerateConfig.rounds
        progress.print(f"correctors of more data may hold it: the same command with rounds={rounds}")
    save_agent(out, teacher, out / "evaluation", out / "correctors")
    progress.print(how_to_watch(out, c.task))
    return out


def how_to_watch(out: Path, task: str) -> str:
    """What a user can do with the agent in `out`; only a task on the command line imports its module."""
    given = f" task={task}" if ":" in task else ""
    return f'Watch it: `tdmpc2 play {out}{given}`. In Python: tdmpc2.load_agent("{out}").'


def _expected_time(config: AccelerateConfig, teacher: Teacher, workers: Workers) -> str:
    """Compile what the run needs, and say how long its plans take. They take most of its time."""
    c, own, shape = config, config.evaluation, teacher.model.config
    with closing(teacher.env()) as env:
        obs, _ = env.reset(seed=0)
        steps = max_episode_steps(env)
    modes: dict[str, tuple[SpeculationConfig, BaseCorrector | None]] = {"planner": (TEACHER, None)}
    # A step is compiled for a batch of one only.
    ahead = (teacher.planner.horizon, 1, 0) if own.num_envs == 1 else (0,)
    for name in c.distillation.architectures:
        sizes = c.distillation.corrector(name, shape.latent_dim, shape.action_dim)
        corrector = build_corrector(sizes).to(c.device).eval()
        mode = ALONE if name == DISTILLED else SpeculationConfig(2, corrector=name)
        modes |= {f"{name}, {n} ahead": (replace(mode, refine_steps=n), corrector) for n in ahead}
    units = {name: (teacher, *mode, obs) for name, mode in modes.items()}
    seconds = dict(workers.map("compiling", _seconds_of_a_step, units, task=c.task))["planner"]
    compared = families(c.distillation.architectures, own.horizons)
    per_step = 1.5 + sum(1 / k for k in OPEN_LOOP_HORIZONS)  # the baseline, half of its budget, naive_K
    per_step += sum(1 / k for family in compared for k in family.horizons)
    collected = c.data.episodes + c.rounds * c.data.round_episodes
    plans = steps * (collected + own.episodes * per_step + 2 * own.calibration_episodes)
    minutes = plans * seconds / workers.number / 60
    least = f"at least {minutes:.0f} minutes" if minutes >= 2 else "a few minutes"
    return (
        f"{c.task}: about {plans:,.0f} plans of {1e3 * seconds:.0f} ms, so this takes {least} with "
        f"workers={workers.number}"
    )


def _seconds_of_a_step(
    teacher: Teacher,
    mode: SpeculationConfig,
    corrector: BaseCorrector | None,
    obs: np.ndarray,
    advance: Callable[[float], None],
) -> float:
    """The shortest of three steps; the first one may compile. With a corrector, the planner is not called."""
    agent = SpeculativeAgent(teacher.agent(), mode, corrector)
    nothing = torch.zeros(
        1, teacher.planner.horizon, teacher.model.config.action_dim, device=agent.teacher.device
    )
    plan = None if corrector is None else Plan(nothing, nothing, nothing, nothing[:, 0, 0])
    times = []
    for _ in range(3):
        start = time.perf_counter()
        agent.act(obs, plan)
        times.append(time.perf_counter() - start)
        advance(1)
    return min(times)


def check_room_for_agent(out: Path, checkpoint: str) -> None:
    """Raise ConfigError where an agent would be written over its teacher's or another checkpoint."""
    if out.resolve() == Path(checkpoint).resolve():
        raise ConfigError(f"out={out} is the teacher's own folder: choose another one")
    if (out / CONFIG).exists() and not (out / "evaluation" / "settings.json").exists():
        raise ConfigError(f"out={out} holds another checkpoint: choose another one")


def save_agent(folder: Path, teacher: Teacher, evaluation: Path, correctors: Path) -> None:
    """Make `folder` the agent that was chosen in `evaluation`, with the correctors that it was chosen from.

    Args:
        folder: what `tdmpc2.load_agent` then opens.
        teacher: of the agent.
        evaluation: a folder of `evaluate`.
        correctors: where the correctors are; they are copied to `folder/correctors` unless they are there.

    Raises:
        ConfigError: a corrector has changed since it was evaluated.
    """
    for name, weights in read_json(evaluation / "settings.json")["correctors"].items():
        source, own = (parent / name for parent in (correctors, folder / "correctors"))
        if fingerprint(load_corrector(source, teacher.fingerprint)) != weights:
            raise ConfigError(f"{source} was trained again while it was evaluated: choose another out=")
        if source.resolve() != own.resolve():
            with atomic_write(own / FILE) as tmp:
                shutil.copyfile(source / FILE, tmp)
    chosen = read_json(evaluation / "chosen.json")
    save_world_model(
        folder,
        teacher.model,
        task=teacher.task,
        task_index=teacher.task_index,
        discount=teacher.discount,
        planner=asdict(teacher.planner),
        precision=teacher.compute.precision,
        mode=chosen["mode"],
        speculation=chosen["speculation"],
        provenance=provenance(),
    )


def _make_room(out: Path, rounds: int) -> None:
    """Keep the last run's correctors, and their evaluation, as the start of the next round."""
    (out / "config.json").unlink(missing_ok=True)  # no finished agent any more
    before = out / "rounds" / str(rounds + 1)
    if (out / "correctors").exists():
        shutil.rmtree(before, ignore_errors=True)  # of an attempt that was killed here
        (out / "correctors").rename(before)
    for name in ("evaluation", "perturbed"):
        if (out / name).exists():
            (out / name).rename(before / name)


def _where_made(out: Path) -> str:
    """The commits, machines and devices that data and correctors were made by."""
    paths = [
        path for part in ("data/*", "rounds/*", "correctors") for path in out.glob(f"{part}/provenance.json")
    ]
    stages = map(read_json, in_order(paths))
    return "; ".join(
        dict.fromkeys(f"commit {s['commit']}, {s['machine']}, device={s['device']}" for s in stages)
    )


def evaluate_correctors(
    teacher: Teacher,
    folder: Path,
    out: Path,
    config: EvaluationConfig,
    workers: Workers,
    trained: str = "",
    settings: Mapping[str, Any] | None = None,
) -> Choice:
    """Evaluate the correctors in `folder` in every mode into `out`; returns the chosen mode.

    `trained` and `settings` are for the report, see `Origin`.

    Raises:
        CheckpointError: there is no corrector, or one is of another teacher.
        ConfigError: a corrector was trained on episodes that it would be evaluated on.
    """
    found = [name for name in ARCHITECTURES if (folder / name).is_dir()]
    if not found:
        near = [
            f for f in (folder.parent, folder / "correctors") if any((f / n).is_dir() for n in ARCHITECTURES)
        ]
        advice = f"give {near[0]}" if near else "train one with `tdmpc2 distill`"
        raise CheckpointError(f"{folder} is no folder of correctors: {advice}")
    seeds = [*config.seeds, *config.calibration_seeds]
    check_unseen(seeds, [folder / name for name in found])
    device = next(teacher.model.parameters()).device
    networks = {n: load_corrector(folder / n, teacher.fingerprint, device) for n in found}
    validation = []
    for name in found:
        errors = read_header(folder / name).get("errors")
        if errors is None:
            raise CheckpointError(f"the training of {folder / name} did not end: train it again")
        mean = {key: sum(values) / len(values) for key, values in errors.items()}
        validation.append(
            {
                "corrector": name,
                "error": mean["corrector"],
                "plan_error": mean["plan"],
                "prior_error": mean["prior"],
            }
        )
    origin = Origin(validation, trained, settings or {})
    return evaluate(Subject(teacher, networks), config, out, origin, workers)
