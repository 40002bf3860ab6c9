"""The published online algorithm: act, remember, one update a step; and how a run is resumed.

A run is a folder. Its state is saved between episodes, where the simulator needs no saving because
every episode begins from a seed of its own:

    checkpoint.safetensors   everything the future depends on, replaced whole
    replay/                  the episodes, in shards that are written once
    train.csv, eval.csv      one row an episode, one row an evaluation
    tensorboard/             the same as curves
    train_config.json        the settings
    teacher/                 the best evaluated model with both tables and the settings: the result
"""

import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..agent import TDMPC2, SpeculativeAgent
from ..cli import provenance, save_config
from ..config import (
    MODEL_SIZES,
    TEACHER,
    ComputeConfig,
    PlannerConfig,
    UpdateConfig,
    WorldModelConfig,
    at_least,
    discount_of,
    part,
    published_budget,
)
from ..envs import is_episodic, make_env, max_episode_steps
from ..errors import ConfigError, TDMPC2Error
from ..evaluation.rollout import rollout
from ..world_model.checkpoint import WEIGHTS, check_device, save_world_model
from ..world_model.model import WorldModel
from .checkpoint import load_state, read_loop, save_state
from .log import Log
from .replay import Episode, Replay
from .update import INFO, Batch, Update

TABLES = {
    "train": ("step", "episode", "return", "length", "seconds", *INFO),
    "eval": ("step", "mean", "sd", "min", "max", "episodes", "seconds"),
}
# Settings that may differ when a run goes on: they do not change what was learnt so far.
FREE_ON_RESUME = {*("steps", "checkpoint_freq", "work_dir", "resume", "threads", "compile", "wandb_project")}


@dataclass(frozen=True, kw_only=True)
class TrainConfig(PlannerConfig, UpdateConfig):
    """Everything that `scripts/train.py` can be told; steps are agent steps."""

    task: str
    model_size: int = 5  # millions of parameters
    obs: str = "state"  # or "rgb"
    steps: int = 500_000  # the run ends with the first episode that reaches them
    seed_steps: int | None = None  # random actions first; None: 5 episodes, at least 1000
    buffer_size: int = 1_000_000  # observations
    seed: int = 1
    eval_freq: int = 25_000  # steps
    eval_episodes: int = 10
    checkpoint_freq: int = 2_500  # steps
    work_dir: str = ""  # default: runs/<task>/<seed>
    resume: bool = False  # go on with the run in work_dir
    device: str = "cpu"
    threads: int | None = None  # of torch; None: its own choice
    compile: bool = True  # the planner and the update
    precision: str = "float32"  # of products in planning and of hidden layers' in updates, or bfloat16
    wandb_project: str = ""


class Trainer:
    """One training run.

    Args:
        config: the settings; `threads` is for the caller to apply.

    Raises:
        ConfigError: a setting that cannot be, or a work_dir that holds a run already.
        CheckpointError: a run to resume is damaged.
    """

    def __init__(self, config: TrainConfig):
        _check(config)
        self.config = config
        self.folder = Path(config.work_dir or f"runs/{config.task}/{config.seed}")
        self.checkpoint = self.folder / "checkpoint.safetensors"
        saved = self._saved_run()
        torch.manual_seed(config.seed)
        self.env = make_env(config.task, config.seed, config.obs)
        model = WorldModel(self._architecture()).to(config.device).eval()
        self.planner = part(PlannerConfig, config)
        if self.planner.iterations == PlannerConfig.iterations:
            published = published_budget(model.config.action_dim)
            self.planner = replace(self.planner, iterations=published.iterations)
        length = max_episode_steps(self.env)
        if config.buffer_size <= length:
            raise ConfigError(
                f"buffer_size={config.buffer_size}: must hold an episode of {config.task}, "
                f"{length + 1} observations"
            )
        self.discount = discount_of(length)
        default = max(1000, 5 * length)
        self.seed_steps = default if config.seed_steps is None else config.seed_steps
        compute = ComputeConfig(config.precision, config.compile)
        self.agent = TDMPC2(model, self.planner, discount=self.discount, seed=config.seed, compute=compute)
        self.evaluated = TDMPC2(
            model,
            self.planner,
            discount=self.discount,
            num_envs=config.eval_episodes,
            compute=compute,
        )
        noise = self.agent.planner.noise
        self.update = Update(model, part(UpdateConfig, config), self.discount, noise, compute)
        self.replay = Replay(config.buffer_size, self.planner.horizon, config.seed)
        self.generators = {"noise": noise.generator, "replay": self.replay.generator}
        self.step = self.episode = self.updates = self.saved_rows = 0
        self.best_return = -float("inf")
        self.returns: dict[str, float] = {}  # the latest, in training and in evaluation
        self.seconds_before = 0.0
        self.started = time.monotonic()
        self.sizes: dict[str, int] | None = None
        if saved is not None:
            self._restore(saved)

    def run(
        self,
        on_step: Callable[["Trainer"], None] = lambda trainer: None,
        report: Callable[[str], None] = lambda line: None,
    ) -> Path:
        """Train until `steps`, and return the folder of the teacher.

        Args:
            on_step: called after every agent step.
            report: called with a line to show, when something else than a step was done.

        Raises:
            TDMPC2Error: a loss is no longer finite, or the environment fails.
        """
        c = self.config
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.sizes is None:  # what a run left that was killed before its first checkpoint
            for leftover in ("replay", "tensorboard"):
                shutil.rmtree(self.folder / leftover, ignore_errors=True)
        save_config(self.folder / "train_config.json", c)
        log = Log(
            self.folder,
            TABLES,
            sizes=self.sizes,
            step=self.step,
            wandb_project=c.wandb_project,
            config=asdict(c),
        )
        with log:
            while self.step < c.steps:
                begin = self.step
                log.write("train", self._run_episode(on_step, report))
                last = self.step >= c.steps
                evaluate = last or self.step // c.eval_freq > begin // c.eval_freq
                if evaluate:
                    row = self._evaluate()
                    log.write("eval", row)
                    report(
                        f"step {self.step:,}: evaluation {row['mean']:.1f} "
                        f"(sd {row['sd']:.1f}, {c.eval_episodes} episodes), after {row['seconds']:.0f} s"
                    )
                if evaluate or self.step // c.checkpoint_freq > begin // c.checkpoint_freq:
                    self._save(log.sync())
        self.env.close()
        return self._copy_tables()

    def _run_episode(
        self, on_step: Callable[["Trainer"], None], report: Callable[[str], None]
    ) -> dict[str, float]:
        """One episode with an update after each step; returns its row of the table."""
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
            on_step(self)
            due = self._updates_due()
            if due > 1:
                report(f"step {self.step:,}: pretraining, {due:,} updates")
            infos += [self._learn() for _ in range(due)]
            if due and not infos[-1].isfinite().all():
                raise TDMPC2Error(
                    f"training diverged at step {self.step} (a loss is not finite): lower lr; the "
                    f"last checkpoint, if any, is {self.checkpoint}"
                )
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

    def _act(self, obs: np.ndarray) -> np.ndarray:
        if self.updates:
            return self.agent.act(obs, eval_mode=False)
        generator = self.generators["noise"]
        uniform = torch.rand(self.agent.model.config.action_dim, generator=generator, device=generator.device)
        return (2 * uniform - 1).cpu().numpy()

    def _updates_due(self) -> int:
        """After a step: none while seeding, then all that were missed (pretraining), then one."""
        if self.step <= self.seed_steps or not self.replay.num_slices:
            return 0
        return 1 if self.updates else max(self.seed_steps, 1)

    def _learn(self) -> Tensor:
        """One update; returns the values of INFO as one tensor."""
        batch = self.replay.sample(self.config.batch_size)
        batch = Batch(*(column.to(self.agent.device) for column in batch))
        self.updates += 1
        return torch.stack(list(self.update(batch).values()))

    def _evaluate(self) -> dict[str, float]:
        """Episodes without exploration, all at once; the best model so far becomes the teacher."""
        c = self.config
        # The same seeds every time: evaluations differ by what was learnt alone.
        self.evaluated.planner.noise.generator.manual_seed(c.seed)
        agent = SpeculativeAgent(self.evaluated, TEACHER)
        seeds = [self._seed_of("eval", i) for i in range(c.eval_episodes)]
        returns = rollout(agent, lambda: make_env(c.task, obs=c.obs), seeds).episodes["return"]
        mean = self.returns["evaluation"] = float(returns.mean())
        if mean >= self.best_return:
            self.best_return = mean
            self._export()
        return {
            "step": self.step,
            "mean": mean,
            "sd": float(returns.std(ddof=0)),
            "min": float(returns.min()),
            "max": float(returns.max()),
            "episodes": c.eval_episodes,
            "seconds": round(self._seconds(), 1),
        }

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
            shutil.copy(self.folder / name, self.folder / "teacher" / name)
        return self.folder / "teacher"

    def _save(self, sizes: dict[str, int]) -> None:
        """Save the state; the replay's new shard first, so that the state never lacks it."""
        shards = self.folder / "replay"
        self.replay.save(shards, self.saved_rows)
        self.saved_rows = self.replay.end
        loop = {
            "config": asdict(self.config),
            "step": self.step,
            "episode": self.episode,
            "updates": self.updates,
            "rows": self.saved_rows,
            "best_return": self.best_return,
            "seconds": self._seconds(),
            "table_sizes": sizes,
        }
        save_state(self.checkpoint, self.update, self.generators, loop)
        self.replay.forget(shards)

    def _restore(self, loop: dict[str, Any]) -> None:
        load_state(self.checkpoint, self.update, self.generators)
        self.step, self.episode, self.updates = loop["step"], loop["episode"], loop["updates"]
        self.best_return, self.seconds_before = loop["best_return"], loop["seconds"]
        self.saved_rows, self.sizes = loop["rows"], loop["table_sizes"]
        self.replay.load(self.folder / "replay", self.saved_rows)

    def _saved_run(self) -> dict[str, Any] | None:
        """The state to go on from, None for a new run."""
        exists = (self.folder / "train_config.json").exists() or self.checkpoint.exists()
        if exists and not self.config.resume:
            raise ConfigError(
                f"{self.folder} already holds a run: add resume=true to go on with it, or choose "
                "another work_dir"
            )
        if not self.checkpoint.exists():
            found = {p.name for p in self.folder.iterdir()} if self.folder.is_dir() else set()
            # A run killed before its first checkpoint is begun anew; a model is none that it left.
            foreign = found & {"teacher", WEIGHTS} if exists else found
            if foreign:
                raise ConfigError(
                    f"{self.folder} holds {min(foreign)} and no run to go on with: choose another work_dir, "
                    "or empty it"
                )
            return None
        loop, ours = read_loop(self.checkpoint), asdict(self.config)
        for name in ours.keys() - FREE_ON_RESUME:
            if loop["config"].get(name) != ours[name]:
                raise ConfigError(
                    f"the run in {self.folder} has {name}={loop['config'].get(name)}, not "
                    f"{ours[name]}: resume it with its own settings (see train_config.json)"
                )
        return loop

    def _architecture(self) -> WorldModelConfig:
        size = self.config.model_size
        if size not in MODEL_SIZES:
            raise ConfigError(
                f"model_size={size}: choose one of {', '.join(map(str, MODEL_SIZES))} (millions)"
            )
        widths = dict(MODEL_SIZES[size])
        shape, action = self.env.observation_space.shape, self.env.action_space.shape
        assert shape and action
        config = WorldModelConfig(shape, action[0], episodic=is_episodic(self.env))
        config = replace(config, **widths)  # type: ignore[arg-type]
        if config.pixels:  # the convolutions end in 4 x 4 positions
            config = replace(config, latent_dim=16 * config.num_channels)
        return config

    def _seed_of(self, purpose: str, index: int) -> int:
        """Seed of an episode; training and evaluation never share one on purpose."""
        entropy = [self.config.seed, int(purpose == "eval"), index]
        return int(np.random.SeedSequence(entropy).generate_state(1)[0])

    def _seconds(self) -> float:
        return self.seconds_before + time.monotonic() - self.started


def _check(config: TrainConfig) -> None:
    """Raise ConfigError for a number that no run can have."""
    at_least(1, config, "steps", "batch_size", "eval_freq", "eval_episodes", "checkpoint_freq")
    at_least(0, config, "seed")
    check_device(config.device)
