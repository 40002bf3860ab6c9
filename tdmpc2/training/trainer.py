"""The published online algorithm (act, store, one update per step), and resuming a run.

A run is a folder. Its state is saved between episodes. The simulator needs no saving then, because every
episode has its own seed:

    checkpoint.safetensors   the state of the run, replaced whole
    replay/                  the episodes, in shards
    train.csv, eval.csv      one row per episode, one row per evaluation
    tensorboard/             the same as curves
    train_config.json        the settings
    teacher/                 the result: the best evaluated model, with both tables and the settings

Saving takes at most 2 % of the time. An interrupted run loses everything after its last checkpoint: the
current episode, and rarely more. A resumed run writes the same files as an uninterrupted one, except for
measured times.
"""

import math
import os
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..agent import TDMPC2, SpeculativeAgent
from ..checked import Checked, at_least, within
from ..config import (
    MODEL_SIZES,
    SYMLOG,
    TEACHER,
    ComputeConfig,
    PlannerConfig,
    UpdateConfig,
    WorldModelConfig,
    discount_of,
    published_budget,
)
from ..envs import is_episodic, make_env, max_episode_steps
from ..envs.guard import closed_on_error
from ..errors import CheckpointError, ConfigError, TDMPC2Error
from ..evaluation.rollout import rollout
from ..files import atomic_write, difference, file_name, in_use, read_bytes, write_json
from ..progress import SILENT, Progress
from ..provenance import provenance
from ..world_model.checkpoint import WEIGHTS, check_device, save_world_model
from ..world_model.model import WorldModel
from ..world_model.two_hot import support
from .checkpoint import read_state, restore, save_state
from .log import Log
from .replay import Episode, Replay
from .update import INFO, Batch, Update

TABLES = {
    "train": ("step", "episode", "return", "length", "seconds", *INFO),
    "eval": ("step", "mean", "sd", "min", "max", "episodes", "seconds"),
}
MEMORY = 0.7  # fraction of this machine's memory that a buffer should take at most
SAVE_EVERY = 50  # least time between checkpoints, in units of the last save's time
# Settings that may change on resume.
FREE_ON_RESUME = (
    *("steps", "checkpoint_freq", "work_dir", "resume", "threads", "planner.compile", "wandb_project"),
)


@dataclass(frozen=True)
class TrainPlannerConfig(PlannerConfig):
    """The planning budget in training; precision and compilation of planning and updates."""

    compile: bool = True  # the planner and the update
    precision: str = "float32"  # or bfloat16; of products in planning and in hidden layers in updates

    def check_ranges(self) -> None:
        super().check_ranges()
        ComputeConfig(self.precision)


@dataclass(frozen=True)
class TrainEvaluationConfig(Checked):
    """Evaluations during training."""

    freq: int = 25_000  # steps between evaluations
    episodes: int = 10

    def check_ranges(self) -> None:
        at_least(1, self, "freq", "episodes")


@dataclass(frozen=True)
class BinsConfig(Checked):
    """The bins of rewards and values, in symlog units: sign(x) * log(1 + |x|)."""

    vmin: float = WorldModelConfig.vmin
    vmax: float = WorldModelConfig.vmax

    def check_ranges(self) -> None:
        within(self, *SYMLOG, "vmin", "vmax")


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Checked):
    """What to train, where, and how long; steps are agent steps."""

    task: str
    model_size: int = 5  # millions of parameters
    obs: str = "state"  # or "rgb"
    steps: int = 500_000  # the run ends after the first episode that reaches this number
    seed_steps: int | None = None  # steps with random actions first; None: 5 episodes, at least 1000
    buffer_size: int = 1_000_000  # observations
    seed: int = 1
    checkpoint_freq: int = 2_500  # steps per replay shard; checkpoints are at least as frequent
    work_dir: str = ""  # default: runs/<task>/<seed>
    resume: bool = False  # continue the run in work_dir
    device: str = "cpu"
    threads: int | None = None  # PyTorch's; None: its default
    wandb_project: str = ""
    planner: TrainPlannerConfig = field(default_factory=TrainPlannerConfig)
    update: UpdateConfig = field(default_factory=UpdateConfig)
    evaluation: TrainEvaluationConfig = field(default_factory=TrainEvaluationConfig)
    model: BinsConfig = field(default_factory=BinsConfig)

    def check_ranges(self) -> None:
        at_least(1, self, "steps", "buffer_size", "checkpoint_freq", "threads")
        at_least(0, self, "seed", "seed_steps", "model_size")


class Trainer:
    """One training run.

    Args:
        config: the settings; the caller must apply `threads`.

    Raises:
        ConfigError: a setting is invalid, or invalid for this task or machine.
        TaskError: there is no such task.
    """

    def __init__(self, config: TrainConfig):
        check_device(config.device)
        self.config = config
        self.folder = Path(config.work_dir or f"runs/{file_name(config.task)}/{config.seed}")
        self.checkpoint = self.folder / "checkpoint.safetensors"
        torch.manual_seed(config.seed)
        self.env = make_env(config.task, config.seed, config.obs)
        with closed_on_error(self.env):
            self._build()

    def _build(self) -> None:
        """Make the parts of the run."""
        config = self.config
        model = WorldModel(self._architecture()).to(config.device).eval()
        settings = asdict(config.planner)
        compute = ComputeConfig(settings.pop("precision"), settings.pop("compile"))
        self.planner = PlannerConfig(**settings)
        if self.planner.iterations == PlannerConfig.iterations:
            published = published_budget(model.config.action_dim)
            self.planner = replace(self.planner, iterations=published.iterations)
        length = max_episode_steps(self.env)
        default = max(1000, 5 * length)
        self.seed_steps = default if config.seed_steps is None else config.seed_steps
        self._check_episodes(length)
        self.discount = discount_of(length)
        self.agent = TDMPC2(model, self.planner, discount=self.discount, seed=config.seed, compute=compute)
        self.evaluated = TDMPC2(
            model,
            self.planner,
            discount=self.discount,
            num_envs=config.evaluation.episodes,
            compute=compute,
        )
        noise = self.agent.planner.noise
        self.update = Update(model, config.update, self.discount, noise, compute)
        self.replay = Replay(config.buffer_size, self.planner.horizon, config.seed)
        self.generators = {"noise": noise.generator, "replay": self.replay.generator}
        self.step = self.episode = self.updates = 0
        self.evaluated_step = 0  # of the last evaluation
        self.shard = 0  # first row of the open replay shard
        self.saved_step: int | None = None  # of the last checkpoint
        self.saved_at, self.save_seconds = -math.inf, 0.0  # time and duration of the last save
        self.best_return = -math.inf
        self.returns: dict[str, float] = {}  # the latest in training and in evaluation
        self.said: set[str] = set()  # kinds of warnings already given
        self.seconds_before = 0.0
        self.started = time.monotonic()

    def run(
        self,
        progress: Progress = SILENT,
        *,
        on_step: Callable[["Trainer"], None] = lambda trainer: None,
        report: Callable[[str], None] | None = None,
    ) -> Path:
        """Train until `steps`, and return the folder of the teacher.

        Args:
            progress: shows the progress.
            on_step: called after every agent step.
            report: called with each message; None: `progress` prints them.

        Raises:
            ConfigError: the folder is in use or already has a run, or the run to resume has other settings.
            CheckpointError, DataError: the run to resume is damaged.
            FileError: the folder cannot be written to.
            TDMPC2Error: nothing can be learned, a loss is no longer finite, or the environment fails.
        """
        self.progress, self.on_step, self.report = progress, on_step, report or progress.print
        try:
            with in_use(self.folder):
                return self._run()
        finally:
            self.env.close()

    def _run(self) -> Path:
        c = self.config
        sizes = self._resume()
        if sizes is None:  # remove files of a run killed before its first checkpoint
            for leftover in ("replay", "tensorboard"):
                shutil.rmtree(self.folder / leftover, ignore_errors=True)
        else:
            self.report(f"resuming from step {self.step:,}")
        write_json(self.folder / "train_config.json", asdict(c))
        log = Log(
            self.folder, TABLES, sizes=sizes, step=self.step, wandb_project=c.wandb_project, config=asdict(c)
        )
        try:
            with log, self.progress.add("training", c.steps, unit="steps", done=self.step) as self.stage:
                self._loop(log)
        except BaseException:
            if self.saved_step is None:
                saved = "nothing is saved yet"
            else:
                saved = f"resume=true continues from step {self.saved_step:,}"
            self.report(f"stopped at step {self.step:,}; {saved}")
            raise
        return self._copy_tables()

    def _loop(self, log: Log) -> None:
        c = self.config
        self._note()
        while True:
            if self._evaluation_due():
                log.write("eval", self._evaluate())
                self._save(log)
            if self.step >= c.steps:
                return
            begin = self.step
            log.write("train", self._run_episode())
            full = self.step // c.checkpoint_freq > begin // c.checkpoint_freq
            waited = time.monotonic() - self.saved_at
            # Before an evaluation: it takes long, and an interrupted one starts again.
            if full or self._evaluation_due() or waited >= SAVE_EVERY * self.save_seconds:
                self._save(log, full)

    def _evaluation_due(self) -> bool:
        last, freq = self.evaluated_step, self.config.evaluation.freq
        return self.step > last and (self.step >= self.config.steps or self.step // freq > last // freq)

    def _run_episode(self) -> dict[str, float]:
        """Run an episode with an update after each step; returns its row of the table."""
        start = time.monotonic()
        obs, _ = self.env.reset(seed=self._seed_of("train", self.episode))
        self.agent.reset()
        observations, steps, infos = [obs], [], []
        done = False
        while not done:
            action = self._act(obs)
            obs, reward, terminated, done, _ = self.env.step(action)
            done = done or terminated
            observations.append(obs)
            steps.append((action, float(reward), float(terminated)))
            self.step += 1
            self.stage.at(self.step)
            self.on_step(self)
            infos += self._learn()
        actions, rewards, terminations = zip(*steps, strict=True)
        self.replay.add(
            Episode(
                torch.from_numpy(np.stack(observations)),
                torch.from_numpy(np.stack(actions)),
                torch.tensor(rewards),
                torch.tensor(terminations),
            )
        )
        self.episode += 1
        self.returns["return"] = sum(rewards)
        self._note()
        self._check_learning(rewards, terminated)
        row: dict[str, float] = {
            "step": self.step,
            "episode": self.episode,
            "return": self.returns["return"],
            "length": len(steps),
            "seconds": round(time.monotonic() - start, 3),
        }
        if infos:
            row |= dict(zip(INFO, torch.stack(infos).mean(0).tolist(), strict=True))
        return row

    def _check_learning(self, rewards: Sequence[float], terminated: bool) -> None:
        """After an episode, warn if parts of it cannot be learned; stop if nothing can."""
        c, horizon = self.config, self.planner.horizon
        if len(rewards) < horizon and not terminated:
            self._warn(
                f"episode {self.episode} was cut off after {len(rewards)} steps: training ignores episodes "
                f"shorter than planner.horizon={horizon} that do not terminate",
                "short",
            )
        if not self.updates and self.step > self.seed_steps and not self.replay.num_slices:
            raise TDMPC2Error(
                f"nothing can be learned: none of the {self.episode} episodes so far lasted "
                f"planner.horizon={horizon} steps or terminated; set a smaller horizon, or more seed_steps"
            )
        if not self.updates and self.step >= c.steps:
            raise TDMPC2Error(
                f"nothing was learned in {self.step} steps: updates begin after seed_steps={self.seed_steps} "
                "and one whole episode; set more steps"
            )
        low, high = support(self.agent.model.config)
        lowest = min(*rewards, self.update.lowest.item())
        highest = max(*rewards, self.update.highest.item())
        if lowest < low or highest > high:
            self._warn(
                f"step {self.step:,}: rewards or returns from {lowest:,.0f} to {highest:,.0f} exceed the "
                f"model's bins from {low:,.0f} to {high:,.0f} and are clamped: scale the rewards, or train "
                f"again with model.vmin={self._bound(lowest, c.model.vmin):g} "
                f"model.vmax={self._bound(highest, c.model.vmax):g}",
                "range",
            )

    def _bound(self, value: float, usual: float) -> float:
        """A bound of the bins, wide enough for rewards of `value`, and at least the usual one."""
        enough = math.ceil(math.log1p(abs(value) / (1 - self.discount)))
        return math.copysign(max(enough, abs(usual)), usual)

    def _act(self, obs: np.ndarray) -> np.ndarray:
        if self.updates:
            return self.agent.act(obs, eval_mode=False)
        generator = self.generators["noise"]
        uniform = torch.rand(self.agent.model.config.action_dim, generator=generator, device=generator.device)
        return (2 * uniform - 1).cpu().numpy()

    def _learn(self) -> list[Tensor]:
        """Make the updates due after a step; returns the values of INFO of each, as one tensor.

        No update during seed steps, then as many as were missed (pretraining), then one per step.
        """
        if self.step <= self.seed_steps or not self.replay.num_slices:
            return []
        if self.updates:
            infos = [self._update()]
        else:
            infos = []
            missed = max(self.seed_steps, 1)
            with self.progress.add("pretraining", missed, unit="updates") as stage:
                for _ in range(missed):
                    infos.append(self._update())
                    stage.advance()
        if not infos[-1].isfinite().all():
            raise TDMPC2Error(f"training diverged at step {self.step}, a loss is not finite: lower update.lr")
        return infos

    def _update(self) -> Tensor:
        batch = self.replay.sample(self.config.update.batch_size)
        batch = Batch(*(column.to(self.agent.device) for column in batch))
        self.updates += 1
        return torch.stack(list(self.update(batch).values()))

    def _evaluate(self) -> dict[str, float]:
        """Run episodes without exploration as one batch; the best model so far becomes the teacher."""
        c = self.config
        # The same seeds in every evaluation, so that only learning makes a difference.
        self.evaluated.planner.noise.generator.manual_seed(c.seed)
        agent = SpeculativeAgent(self.evaluated, TEACHER)
        seeds = [self._seed_of("eval", i) for i in range(c.evaluation.episodes)]
        with self.progress.add("evaluating", max_episode_steps(self.env), unit="steps") as stage:
            result = rollout(
                agent, lambda: make_env(c.task, obs=c.obs), seeds, on_step=lambda done: stage.advance()
            )
        returns = result.episodes["return"]
        mean = self.returns["evaluation"] = float(returns.mean())
        self._note()
        if mean >= self.best_return:
            self.best_return = mean
            self._export()
        self.evaluated_step = self.step
        row = {
            "step": self.step,
            "mean": mean,
            "sd": float(returns.std(ddof=0)),
            "min": float(returns.min()),
            "max": float(returns.max()),
            "episodes": c.evaluation.episodes,
            "seconds": round(self._seconds(), 1),
        }
        self.report(
            f"step {self.step:,}: evaluation {mean:.1f} (sd {row['sd']:.1f}, {row['episodes']} episodes), "
            f"after {row['seconds']:.0f} s"
        )
        return row

    def _export(self) -> None:
        save_world_model(
            self.folder / "teacher",
            self.agent.model,
            task=self.config.task,
            obs=self.config.obs,
            discount=self.discount,
            planner=asdict(self.planner),
            step=self.step,
            eval_return=self.best_return,
            provenance=provenance(),
        )

    def _copy_tables(self) -> Path:
        for name in ("train.csv", "eval.csv", "train_config.json"):
            with atomic_write(self.folder / "teacher" / name) as tmp:
                shutil.copyfile(self.folder / name, tmp)
        return self.folder / "teacher"

    def _save(self, log: Log, full: bool = False) -> None:
        """Save the replay's shard, then the state.

        `full` closes the shard. It depends on steps alone, not on the times of checkpoints, so equal runs
        write equal shards.
        """
        began = time.monotonic()
        sizes, shards = log.sync(), self.folder / "replay"
        self.replay.save(shards, self.shard)
        self.shard = self.replay.end if full else self.shard
        save_state(self.checkpoint, self.update, self.generators, self._where(sizes))
        self.replay.forget(shards)
        self.saved_step, self.saved_at = self.step, time.monotonic()
        self.save_seconds = self.saved_at - began

    def _where(self, sizes: dict[str, int]) -> dict[str, Any]:
        """The state of the loop, as JSON values."""
        return {
            "config": asdict(self.config),
            "step": self.step,
            "episode": self.episode,
            "updates": self.updates,
            "evaluated_step": self.evaluated_step,
            "shard": self.shard,
            "first_row": self.replay.first,
            "end_row": self.replay.end,
            "best_return": self.best_return,
            "seconds": self._seconds(),
            "table_sizes": sizes,
        }

    def _resume(self) -> dict[str, int] | None:
        """Resume from the checkpoint in the folder; returns the sizes of its tables, None for a new run."""
        begun = self.checkpoint.exists() or (self.folder / "replay").exists()
        settings = (self.folder / "train_config.json").exists()
        if begun and settings and not self.config.resume:
            raise ConfigError(
                f"{self.folder} already holds a run: add resume=true to continue it, or choose "
                "another work_dir"
            )
        if not self.checkpoint.exists():
            foreign = {p.name for p in self.folder.iterdir() if not p.name.startswith(".")}
            if settings:  # a run killed in its first episode, before its first checkpoint, has no model
                foreign &= {"teacher", WEIGHTS, *(["train.csv"] if self._num_rows() > 1 else [])}
            if foreign:
                raise ConfigError(
                    f"{self.folder} holds {min(foreign)} and no run to resume: choose another work_dir, "
                    "or empty it"
                )
            return None
        tensors, loop = read_state(self.checkpoint, self._where({}))
        if differs := difference(loop["config"], asdict(self.config), FREE_ON_RESUME):
            raise ConfigError(
                f"the run in {self.folder} has {differs}: resume it with the settings in its "
                "train_config.json"
            )
        restore(self.checkpoint, tensors, self.update, self.generators)
        self.step = self.saved_step = loop["step"]
        self.episode, self.updates = loop["episode"], loop["updates"]
        self.evaluated_step, self.shard = loop["evaluated_step"], loop["shard"]
        self.best_return, self.seconds_before = loop["best_return"], loop["seconds"]
        self.replay.load(self.folder / "replay", loop["first_row"], loop["end_row"], self._empty_episode())
        teacher = self.folder / "teacher" / WEIGHTS
        if self.evaluated_step and not teacher.exists():
            raise CheckpointError(f"{teacher} is missing: restore it, or start another run elsewhere")
        return loop["table_sizes"]

    def _num_rows(self) -> int:
        """Number of episodes in the folder's table."""
        table = self.folder / "train.csv"
        return len(read_bytes(table).splitlines()) - 1 if table.exists() else 0

    def _empty_episode(self) -> Episode:
        """One row of the replay buffer."""
        shape, action = self.env.observation_space.shape, self.env.action_space.shape
        assert shape and action
        obs, column = np.zeros((1, *shape), self.env.observation_space.dtype), torch.zeros(1)
        return Episode(torch.from_numpy(obs), torch.zeros(1, *action), column, column)

    def _architecture(self) -> WorldModelConfig:
        c = self.config
        if c.model_size not in MODEL_SIZES:  # a task's module may add sizes
            sizes = ", ".join(map(str, MODEL_SIZES))
            raise ConfigError(f"model_size={c.model_size}: choose one of {sizes} (millions)")
        shape, action = self.env.observation_space.shape, self.env.action_space.shape
        assert shape and action
        config = WorldModelConfig(shape, action[0], episodic=is_episodic(self.env), **asdict(c.model))
        config = replace(config, **MODEL_SIZES[c.model_size])  # type: ignore[arg-type]
        if config.pixels:  # the convolutions end with 4 x 4 positions
            config = replace(config, latent_dim=16 * config.num_channels)
        return config

    def _check_episodes(self, length: int) -> None:
        """Raise ConfigError if episodes of at most `length` steps cannot be stored or learned from."""
        c = self.config
        if length < c.planner.horizon:
            raise ConfigError(
                f"planner.horizon={c.planner.horizon}: episodes of {c.task} last at most {length} steps: set "
                f"planner.horizon={length}"
            )
        if c.steps <= self.seed_steps:
            raise ConfigError(
                f"steps={c.steps}: nothing would be learned, because the first seed_steps={self.seed_steps} "
                "steps have random actions; set more steps or fewer seed_steps"
            )
        if c.buffer_size <= length:
            raise ConfigError(
                f"buffer_size={c.buffer_size}: must hold an episode of {c.task}, {length + 1} observations"
            )
        row = sum(column.nbytes for column in self._empty_episode())
        rows = min(c.buffer_size, c.steps + c.steps // length + length + 1)
        if rows * row > (memory := _memory()):
            raise ConfigError(
                f"buffer_size={c.buffer_size}: the {rows:,} observations of this run take "
                f"{rows * row / 1e9:.1f} GB, but this machine has {memory / 1e9:.1f} GB of memory: set "
                f"buffer_size={int(MEMORY * memory / row)}, or less"
            )

    def _seed_of(self, purpose: str, index: int) -> int:
        """Seed of an episode; training and evaluation have different seeds."""
        entropy = [self.config.seed, int(purpose == "eval"), index]
        return int(np.random.SeedSequence(entropy).generate_state(1)[0])

    def _seconds(self) -> float:
        return self.seconds_before + time.monotonic() - self.started

    def _note(self) -> None:
        """Show the latest returns beside the progress bar."""
        returns = [f"{name} {value:.1f}" for name, value in self.returns.items()]
        self.stage.note(", ".join(returns if self.updates else ["random actions", *returns]))

    def _warn(self, line: str, kind: str) -> None:
        """Report a line, once per kind and run."""
        if kind not in self.said:
            self.said.add(kind)
            self.report(line)


def _memory() -> float:
    """Bytes of memory of this machine or container; infinity if unknown."""
    found = []
    with suppress(AttributeError, OSError, ValueError):  # not on Windows
        found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    with suppress(OSError, ValueError):  # no container, or without a limit
        found.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return min(found, default=math.inf)
