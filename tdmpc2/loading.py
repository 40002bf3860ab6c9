"""A path in, an agent out.

    load_agent           an agent, from any checkpoint
      open_checkpoint    its world model and planning settings     read_config, load_world_model
      read_mode          its mode, with the corrector              read_config, load_corrector

`teacher.open_teacher` opens the same checkpoint for a task that has an environment here.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Unpack

import torch

from .agent import TDMPC2, SpeculativeAgent
from .background import in_background
from .config import (
    COMPILED,
    TEACHER,
    ComputeConfig,
    PlannerConfig,
    SpeculationConfig,
    Unsaid,
    discount_of,
    published_budget,
)
from .corrector import ARCHITECTURES, BaseCorrector, load_corrector
from .errors import CheckpointError, ConfigError
from .world_model.checkpoint import (
    fingerprint,
    load_world_model,
    published_task_index,
    read_config,
    saved_as,
    spelling,
)
from .world_model.model import WorldModel


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint. An original file gets the published budget and the discount for 500 steps."""

    path: str | Path
    saved: Mapping[str, Any]  # config.json; empty for an original file
    model: WorldModel
    planner: PlannerConfig
    discount: float  # per agent step
    compute: ComputeConfig  # compiled, in the precision of the agent's evaluation

    def task_index(self, task: int | str | None) -> int | None:
        """Index of a task in a multi-task model; None in a single-task model.

        Args:
            task: index, or name in any spelling; None: the checkpoint's own.

        Raises:
            CheckpointError: the checkpoint was made for another task, or does not know the name.
        """
        own, num_tasks = self.saved.get("task_index"), self.model.config.num_tasks
        if isinstance(task, str) and not num_tasks:
            if spelling(self.saved.get("task", task)) != spelling(task):
                raise CheckpointError(
                    f"{self.path} was made for {self.saved['task']}; {task} is another task"
                )
            return None
        index = published_task_index(task, num_tasks) if isinstance(task, str) else task
        if own is not None and index not in (None, own):
            raise CheckpointError(
                f"{self.path} was made for {self.saved.get('task')}, task {own}; task={task} is another task"
                ": open the multi-task checkpoint that it was made from"
            )
        return own if index is None else index


def open_checkpoint(
    path: str | Path, device: str | torch.device = "cpu", **unsaid: Unpack[Unsaid]
) -> Checkpoint:
    """Open an original `.pt` file or our folder; args and errors as in `load_world_model`."""
    model = load_world_model(path, device, **unsaid)
    saved = read_config(path)
    planner = published_budget(model.config.action_dim)
    if "planner" in saved:
        planner = saved_as(PlannerConfig, saved["planner"], path)
    compute = replace(COMPILED, precision=saved.get("precision", COMPILED.precision))
    return Checkpoint(path, saved, model, planner, saved.get("discount", discount_of(500)), compute)


def read_mode(path: str | Path, model: WorldModel) -> tuple[SpeculationConfig, BaseCorrector | None]:
    """The mode of a checkpoint, and its corrector for `model`; TEACHER if it names no mode.

    Raises:
        CheckpointError: the mode is of another version, or its corrector cannot be used.
    """
    saved = read_config(path)
    if "speculation" not in saved:
        return TEACHER, None
    config = saved_as(SpeculationConfig, saved["speculation"], path)
    if not config.corrector:
        return config, None
    if config.corrector not in ARCHITECTURES:  # also refuses a path
        raise CheckpointError(f"{path} names a corrector {config.corrector!r}, which does not exist")
    folder = Path(path) / "correctors" / config.corrector
    return config, load_corrector(folder, fingerprint(model), next(model.parameters()).device)


def load_agent(
    path: str | Path,
    device: str | torch.device = "cpu",
    *,
    num_envs: int = 1,
    seed: int = 0,
    task: int | str | None = None,
    compute: ComputeConfig | None = None,
    background: bool = False,
    **unsaid: Unpack[Unsaid],
) -> TDMPC2 | SpeculativeAgent:
    """The agent of a checkpoint: speculative if the folder names a mode, else the teacher.

        agent = tdmpc2.load_agent("pretrained/walker-walk")
        agent.reset()
        action = agent.act(obs)  # in [-1, 1], once an agent step

    `TDMPC2.act` says what your own loop must do. Processes forked from this one use one thread.

    Args:
        path: an original `.pt` file or our folder.
        device: to act on.
        num_envs: rows of the batch.
        seed: of the planner's noise.
        task: of a multi-task model: the name of a published task, or an index; None: the folder's own.
        compute: precision of planning, and whether to compile; None: compiled, in the precision of the
            folder's evaluation, or float32.
        background: plan in another process, so that no action waits for a plan but an episode's first; see
            `BackgroundAgent`.
        unsaid: `vmin`, `vmax` and `simnorm_dim` of an original file, see `load_world_model`.

    Raises:
        CheckpointError: the checkpoint is missing, damaged, foreign or unsafe, or was made for another task.
        FileError: the checkpoint cannot be read.
        ConfigError: a setting is invalid.
    """
    checkpoint = open_checkpoint(path, device, **unsaid)
    make_teacher = partial(
        TDMPC2,
        checkpoint.model,
        checkpoint.planner,
        discount=checkpoint.discount,
        num_envs=num_envs,
        seed=seed,
        task=checkpoint.task_index(task),
        compute=compute or checkpoint.compute,
    )
    mode, corrector = read_mode(path, checkpoint.model)
    if not background:
        teacher = make_teacher()
        return teacher if mode is TEACHER else SpeculativeAgent(teacher, mode, corrector)
    if mode is TEACHER:
        raise ConfigError(
            f"background=True: {path} is a teacher, which needs a plan at every step: "
            "make an agent of it with tdmpc2 accelerate"
        )
    return in_background(make_teacher, mode, corrector)
