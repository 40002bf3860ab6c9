"""A teacher and its task: every command opens one, and makes agents and environments from it."""

from contextlib import closing
from dataclasses import dataclass, replace

import gymnasium as gym

from .agent import TDMPC2
from .config import BudgetOverride, ComputeConfig, ModelOverride, PlannerConfig, discount_of
from .envs import PadForModel, make_env, max_episode_steps
from .envs.guard import closed_on_error
from .envs.perturb import Perturbed
from .errors import CheckpointError, ConfigError, TaskError
from .inference import resolved
from .loading import open_checkpoint
from .world_model import WorldModel, fingerprint


@dataclass(frozen=True)
class Teacher:
    """A world model, its planning budget, and its task."""

    task: str
    model: WorldModel
    planner: PlannerConfig
    discount: float  # per agent step, from the task's episode length
    fingerprint: str  # of the weights
    task_index: int | None  # in a multi-task model
    compute: ComputeConfig  # precision and compilation
    perturbation: tuple[str, float] | None = None  # kind and strength

    @property
    def precision(self) -> str:
        """Of planning, on this device."""
        return resolved(self.compute, next(self.model.parameters()).device).precision

    def agent(self, num_envs: int = 1, seed: int = 0) -> TDMPC2:
        """An agent that replans at every step."""
        return TDMPC2(
            self.model,
            self.planner,
            discount=self.discount,
            num_envs=num_envs,
            seed=seed,
            task=self.task_index,
            compute=self.compute,
        )

    def env(self) -> gym.Env:
        """An environment of the task, padded to the shapes of the model."""
        config = self.model.config
        env: gym.Env = make_env(self.task, obs="rgb" if config.pixels else "state")
        with closed_on_error(env):
            if self.perturbation is not None:
                env = Perturbed(env, *self.perturbation)
            if self.task_index is not None:
                env = PadForModel(env, config.obs_shape[0], config.action_dim)
        return env

    def perturbed(self, kind: str, strength: float) -> "Teacher":
        """The same teacher in a perturbed world.

        Raises:
            ConfigError: there is no such perturbation.
            TaskError: the task cannot be perturbed in this way.
        """
        teacher = replace(self, perturbation=(kind, strength))
        teacher.env().close()
        return teacher


def open_teacher(
    task: str | None,
    checkpoint: str,
    budget: BudgetOverride,
    unsaid: ModelOverride | None = None,
    device: str = "cpu",
) -> Teacher:
    """Open a checkpoint for a task.

    Args:
        task: its name, which also selects the task of a multi-task checkpoint; None: the checkpoint's own.
        checkpoint: an original .pt file or our folder.
        budget: changes of the checkpoint's planning budget, precision and compilation.
        unsaid: facts that an original file does not contain; None: as published.
        device: to act on.

    Raises:
        CheckpointError: the checkpoint cannot be used, or was made for another task, or for other observation
            or action shapes.
        FileError: the checkpoint cannot be read.
        ConfigError: a setting of `budget` or `unsaid` is invalid.
        TaskError: there is no such task.
    """
    opened = open_checkpoint(checkpoint, device, **(unsaid or ModelOverride()).unsaid())
    model, config = opened.model, opened.model.config
    task = task or opened.saved.get("task")
    if task is None:
        raise ConfigError(f"task=... is required: {checkpoint} does not name its task")
    compute = ComputeConfig(budget.precision or opened.compute.precision, budget.compile)
    index = opened.task_index(task)
    try:
        env = make_env(task, obs="rgb" if config.pixels else "state")
    except TaskError as e:
        if index is None:
            raise
        raise TaskError(
            f"{checkpoint} knows {task}, but no environment here does: make your own environment, and the "
            f"agent with load_agent(..., task={task!r})"
        ) from e
    with closing(env):
        obs_shape, action_shape = env.observation_space.shape, env.action_space.shape
        discount = discount_of(max_episode_steps(env))
    assert obs_shape is not None
    expected: tuple[tuple[int, ...], tuple[int, ...]]
    expected = (config.obs_shape, (config.action_dim,))
    if index is not None:
        expected = (obs_shape, (config.action_dims[index],))
    if (obs_shape, action_shape) != expected:
        raise CheckpointError(
            f"{checkpoint} was made for observations {config.obs_shape} and actions {expected[1]}, "
            f"{task} has {obs_shape} and {action_shape}: the checkpoint is for another task"
        )
    return Teacher(task, model, budget.apply(opened.planner), discount, fingerprint(model), index, compute)
