"""A teacher on its task: what every script opens first, from which agents and environments are made."""

from contextlib import closing
from dataclasses import dataclass, replace

import gymnasium as gym

from .agent import TDMPC2
from .config import BudgetOverride, ComputeConfig, ModelOverride, PlannerConfig, discount_of
from .envs import PadForModel, make_env, max_episode_steps
from .envs.guard import closed_on_error
from .envs.perturb import Perturbed
from .errors import CheckpointError, ConfigError, TaskError
from .loading import open_checkpoint
from .world_model import WorldModel, fingerprint


@dataclass(frozen=True)
class Teacher:
    """A world model, its planning budget, and the task that it plays."""

    task: str
    model: WorldModel
    planner: PlannerConfig
    discount: float  # per agent step, by the task's episode length
    fingerprint: str  # of the weights
    task_index: int | None  # in a multi-task model
    compute: ComputeConfig  # how it plans, not what
    perturbation: tuple[str, float] | None = None  # kind and strength: its world is then not as modelled

    def agent(self, num_envs: int = 1, seed: int = 0) -> TDMPC2:
        """The teacher's own agent, which replans at every step."""
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
        """An environment of the task, in the shapes that the model takes."""
        config = self.model.config
        env: gym.Env = make_env(self.task, obs="rgb" if config.pixels else "state")
        with closed_on_error(env):
            if self.perturbation is not None:
                env = Perturbed(env, *self.perturbation)
            if self.task_index is not None:
                env = PadForModel(env, config.obs_shape[0], config.action_dim)
        return env

    def perturbed(self, kind: str, strength: float) -> "Teacher":
        """The same teacher in a world that is not as modelled.

        Raises:
            ConfigError: there is no such perturbation.
            TaskError: the task's world cannot be perturbed in that way.
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
        task: its name; for a published multi-task checkpoint it also says which of its tasks. None: the task
            that the checkpoint says it is of.
        checkpoint: an original .pt file or a folder of ours.
        budget: changes of the planning budget that the checkpoint comes with, and of how to compute.
        unsaid: what an original file does not say; None: as published.
        device: to act on.

    Raises:
        CheckpointError: the checkpoint cannot be used, was made for other observations or actions, or says
            that it was made for another task.
        FileError: it may not be read.
        ConfigError: a setting of `budget` or `unsaid` cannot be.
        TaskError: there is no such task.
    """
    opened = open_checkpoint(checkpoint, device, **(unsaid or ModelOverride()).unsaid())
    model, config = opened.model, opened.model.config
    task = task or opened.saved.get("task")
    if task is None:
        raise ConfigError(f"task=... is required: {checkpoint} does not say what it was made for")
    compute = ComputeConfig(budget.precision or opened.compute.precision, budget.compile)
    index = opened.task_index(task)
    try:
        env = make_env(task, obs="rgb" if config.pixels else "state")
    except TaskError as e:
        if index is None:
            raise
        raise TaskError(
            f"{checkpoint} knows {task}, but no environment here does: make one of your own, and an agent "
            f"for it by load_agent(..., task={task!r})"
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
            f"{task} has {obs_shape} and {action_shape}: it is of another task"
        )
    return Teacher(task, model, budget.apply(opened.planner), discount, fingerprint(model), index, compute)
