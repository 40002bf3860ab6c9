"""Acting: `TDMPC2` replans at every step; `SpeculativeAgent` executes several steps of each plan.

Both act for a batch of environments at once, each row with an episode of its own. What an agent remembers
of an episode begins with `reset(mask)`. One robot is a batch of one, and may leave the batch axis out.

What the speculative agent keeps for each row, in an example with execution horizon 4, planning horizon 3
and a corrector; `d` is the latent dynamics, `c` the corrector, `pi` the prior's mean:

    step in plan k   planned action   predicted latent     executed
    0                a0               z_0, the real one    a0, drawn where the step before was planned too
    1                a1               y1 = d(z_0, a0)      b1 = c(z_1, y1, a1)
    2                a2               y2 = d(y1, b1)       b2 = c(z_2, y2, a2)
    3 (past H)       pi(z_3)          y3 = d(y2, b2)       b3 = c(z_3, y3, pi(z_3))
    4                a replan is due: k = 0 again
"""

import math
from collections.abc import Callable
from dataclasses import replace
from enum import IntEnum
from pathlib import Path
from typing import Any, NamedTuple, Unpack

import numpy as np
import torch
from torch import Tensor

from .config import (
    COMPILED,
    EAGER,
    TEACHER,
    ComputeConfig,
    PlannerConfig,
    SpeculationConfig,
    Unsaid,
    discount_of,
    published_budget,
)
from .corrector import ARCHITECTURES, BaseCorrector, History, load_corrector
from .errors import CheckpointError, ConfigError, ObservationError
from .inference import AheadOfTime, Compiled, forks_have_one_thread
from .inputs import Array, like, read_mask, read_observation
from .mismatch import mismatch
from .planner import NoiseSource, Plan, Planner, warm_start
from .refine import refine
from .world_model.checkpoint import (
    fingerprint,
    load_world_model,
    published_task_index,
    saved_as,
    saved_config,
    spelling,
)
from .world_model.model import WorldModel


class Kind(IntEnum):
    """What an agent did in a step."""

    PLANNED = 0  # a replan was due; its first action
    CORRECTED = 1  # a later action of the plan, corrected
    OPEN_LOOP = 2  # a later action of the plan, as it was planned
    FALLBACK = 3  # the mismatch was above the threshold: replanned, the new plan's first action
    PRIOR = 4  # no plan was made: the policy prior's action, or a corrector's in its place


class StepInfo(NamedTuple):
    """What happened in the last `act`, row by row."""

    kind: Tensor  # [B] long, values of Kind
    k: Tensor  # [B] long, step in plan; of a fallback, the step that was not executed
    mismatch: Tensor  # [B], NaN where a replan was due
    correction: Tensor  # [B], norm of executed minus planned action

    @property
    def kinds(self) -> list[Kind]:
        """`kind` by name, e.g. `[Kind.PLANNED, Kind.CORRECTED]`."""
        return [Kind(kind) for kind in self.kind.tolist()]

    def __repr__(self) -> str:
        """In words: `kind=CORRECTED, k=2, mismatch=0.25, ...`, in a larger batch with lists."""
        columns = {"kind": [kind.name for kind in self.kinds]}
        columns |= {name: [f"{x:.4g}" for x in getattr(self, name).tolist()] for name in self._fields[1:]}
        return ", ".join(
            f"{name}={x[0] if len(x) == 1 else '[' + ', '.join(x) + ']'}" for name, x in columns.items()
        )


class Step(NamedTuple):
    """What is executed in one step of a plan, and remembered for the next."""

    planned: Tensor  # [B, A]
    action: Tensor  # [B, A], corrected and refined
    z_pred: Tensor  # [B, L], predicted for the next step
    history: History | None  # this step included


def corrected_step(x: list[Tensor]) -> Step:
    """The tensors of a `Step` with a history, put together again."""
    return Step(x[0], x[1], x[2], History(x[3], x[4]))


class TDMPC2:
    """The teacher: a world model, a planner and its warm start, replanning at every step.

    Args:
        model: the world model, on the device to act on.
        planner: the planning budget.
        discount: per agent step.
        num_envs: rows of the batch.
        seed: of the planner's noise.
        task: index of the task, for a multi-task model.
        compute: precision of planning, and whether to compile; not of encoding and acting.
    """

    def __init__(
        self,
        model: WorldModel,
        planner: PlannerConfig,
        *,
        discount: float = 0.99,
        num_envs: int = 1,
        seed: int = 0,
        task: int | None = None,
        compute: ComputeConfig = EAGER,
    ):
        if not isinstance(num_envs, int | np.integer) or num_envs < 1:
            raise ConfigError(f"num_envs={num_envs}: must be a whole number, at least 1")
        if task is not None and not model.config.num_tasks:
            raise ConfigError(f"task={task}: this model knows a single task")
        if model.config.num_tasks and not (task is not None and 0 <= task < model.config.num_tasks):
            raise ConfigError(
                f"a multi-task model needs the index of its task, 0 to {model.config.num_tasks - 1}"
            )
        self.model, self.num_envs = model, num_envs
        self.device = next(model.parameters()).device
        self.planner = Planner(model, planner, discount, NoiseSource(seed, self.device), compute)
        self.task = None
        shape = (num_envs, planner.horizon, model.config.action_dim)
        with torch.inference_mode(False):  # tensors made in that mode could not be changed outside of it
            if task is not None:
                self.task = torch.full((num_envs,), task, dtype=torch.long, device=self.device)
            self._mean = torch.zeros(shape, dtype=torch.float32, device=self.device)
            self._one_step = torch.ones(num_envs, dtype=torch.long, device=self.device)
        self._has_acted = False
        forks_have_one_thread()

    def __repr__(self) -> str:
        c, size = self.planner.config, sum(p.numel() for p in self.model.parameters())
        return (
            f"TDMPC2({self.num_envs} rows; {size / 1e6:.1f}M parameters; {c.num_samples} samples, "
            f"{c.iterations} iterations, horizon {c.horizon})"
        )

    @property
    def info(self) -> StepInfo | None:
        """What happened in the last `act`: every row was planned. None before the first."""
        if not self._has_acted:
            return None
        nothing = torch.zeros(self.num_envs, dtype=torch.float32, device=self.device)
        kind, none = nothing.long(), torch.full_like(nothing, torch.nan)
        return StepInfo(kind=kind, k=kind, mismatch=none, correction=nothing)

    @torch.inference_mode(False)
    def reset(self, mask: object = None) -> None:
        """Begin an episode in the rows where `mask` `[B]` is True (or 1), or in all.

        Raises:
            ConfigError: the mask has another shape, or other values.
        """
        self._mean[read_mask(mask, self.num_envs, self.device)] = 0.0

    @torch.inference_mode(False)
    @torch.no_grad()
    def act(self, obs: Array, *, eval_mode: bool = True) -> Array:
        """Action `[B, A]` float32 in [-1, 1] for observations `[B, *obs_shape]`, or both without B.

        In a loop of your own, keep to what the model was trained with, as `tdmpc2.make_env` does. An
        observation has its entries in the same order: for dm_control that of the task, not sorted by name. An
        action is scaled from [-1, 1] to the actuators' ranges and held for as many control steps (the action
        repeat): 2 for dm_control. Call `reset` where an episode begins, and then `act` once an agent step.

        Args:
            obs: an array, which gives an array; a tensor, which gives a tensor; or a sequence of numbers.
                Pixels are uint8.
            eval_mode: False adds the planner's exploration noise.

        Raises:
            ObservationError: it is something else, has a wrong shape, or is not finite. Nothing has changed.
        """
        action = self.plan(self.encode(obs), eval_mode=eval_mode).actions[:, 0]
        self._has_acted = True
        return like(action, obs, self.model.config)  # type: ignore[return-value]

    @torch.no_grad()
    def encode(self, obs: object) -> Tensor:
        """Latents `[B, L]` of checked observations `[B, *obs_shape]` or `[*obs_shape]`, see `act`."""
        x = read_observation(obs, self.model.config, self.num_envs, self.device)
        z = self.model.encode(x, self.task)
        if not z.isfinite().all():
            fault = "is too large" if x.isfinite().all() else "holds NaN or infinity"
            raise ObservationError(f"observation {fault}: check the environment")
        return z

    @torch.no_grad()
    def plan(
        self,
        z: Tensor,
        rows: Tensor | None = None,
        executed: Tensor | None = None,
        *,
        eval_mode: bool = True,
    ) -> Plan:
        """Plan from latents `[R, L]` for the rows `[R]`, and keep the mean for their next warm start.

        Args:
            z: one latent a row.
            rows: indices; None for all.
            executed: `[R]` steps executed since each row's last plan; None for one each.
            eval_mode: False adds exploration noise.
        """
        index: slice | Tensor = slice(None) if rows is None else rows
        executed = self._one_step[index] if executed is None else executed
        start = warm_start(self._mean[index], executed)
        task = None if self.task is None else self.task[index]
        plan = self.planner.plan(z, start, eval_mode=eval_mode, task=task)
        self._mean[index] = plan.mean
        return plan


class SpeculativeAgent:
    """Executes up to `execution_horizon` steps of each plan, corrects them, and replans when reality drifts.

    With `refine_steps` the corrected action is refined (`refine`) before it is executed. A mismatch above the
    threshold ends a plan early.

    Args:
        teacher: plans, and tells the number of rows; it becomes the agent's own.
        config: the mode of execution.
        corrector: corrects the steps after the first; None executes them as planned.
    """

    def __init__(
        self,
        teacher: TDMPC2,
        config: SpeculationConfig,
        corrector: BaseCorrector | None = None,
    ):
        horizon = teacher.planner.config.horizon
        self.plan_length = horizon if config.plan_length is None else config.plan_length
        if not 0 <= self.plan_length <= horizon:
            raise ConfigError(f"plan_length={config.plan_length}: must be from 0 to the horizon, {horizon}")
        if config.iterations is not None:
            planner = teacher.planner
            planner.config = replace(planner.config, iterations=config.iterations)
        self.teacher, self.config, self.corrector = teacher, config, corrector
        n, model = teacher.num_envs, teacher.model
        latent, action, device = model.config.latent_dim, model.config.action_dim, teacher.device
        numbers: dict[str, Any] = dict(dtype=torch.float32, device=device)  # whatever PyTorch's default is
        with torch.inference_mode(False):  # as in `TDMPC2`
            self._thresholds = torch.tensor(config.threshold or (math.inf,), **numbers)
            self._actions = torch.zeros(n, horizon, action, **numbers)
            self._z_pred = torch.zeros(n, latent, **numbers)
            self._k = torch.full((n,), config.execution_horizon, device=device)
            self._history = None if corrector is None else corrector.no_history(n)
        # At a horizon of 1 every step begins with a plan, whatever was predicted, and a corrector has that
        # step. A bool, so that one compilation serves all horizons.
        self._predicts = config.execution_horizon > 1
        self._step: Callable[..., Step] = self._eager_step
        if teacher.planner.compute.compile and corrector is not None and n == 1:
            # Without a corrector there is little to gain; nor in a larger batch, beside its planning.
            what = "the corrector"
            if device.type == "cpu":
                self._step = AheadOfTime(
                    self._eager_step,
                    corrected_step,
                    what=what,
                    modules=(model, corrector),
                    depends_on=(
                        (model.config, corrector.config),
                        (self.plan_length, self._predicts, config.refine_steps),
                        (teacher.planner.discount, teacher.planner.config.temperature),
                    ),
                )
            else:
                self._step = Compiled(self._eager_step, what=what, device=device)
        self._last: tuple[Tensor, Tensor, Tensor, Tensor, Step] | None = None  # what `info` is made of

    def __repr__(self) -> str:
        return f"SpeculativeAgent({self.config.in_words()}; {self.teacher})"

    @property
    def num_envs(self) -> int:
        return self.teacher.num_envs

    @torch.inference_mode(False)
    def reset(self, mask: object = None) -> None:
        """Begin an episode in the rows where `mask` `[B]` is True (or 1), or in all.

        Raises:
            ConfigError: the mask has another shape, or other values.
        """
        index = read_mask(mask, self.num_envs, self.teacher.device)
        self.teacher.reset(mask)
        self._k[index] = self.config.execution_horizon  # a replan is due
        if self._history is not None:
            self._history.valid[index] = False

    @torch.inference_mode(False)
    @torch.no_grad()
    def act(self, obs: Array, plan: Plan | None = None, *, eval_mode: bool = True) -> Array:
        """Action `[B, A]` float32 in [-1, 1] for observations `[B, *obs_shape]`, or both without B.

        `info` then says what happened. In a loop of your own, observations have the order of entries, and
        actions the scale and the repeat, of the model's training; `TDMPC2.act` says more.

        Args:
            obs: as `TDMPC2.act` takes it.
            plan: one plan for every row, used wherever a replan is due instead of asking the teacher.
            eval_mode: False adds the planner's exploration noise to the first action of every plan; where
                the agent does not plan, it does not explore.

        Raises:
            ObservationError: as `TDMPC2.act`.
        """
        k = self._k
        z = self.teacher.encode(obs)
        due = k >= self.config.execution_horizon
        drift = self._drift(z)
        replan = due | ~(drift <= self._threshold())  # NaN counts as too large
        if replan.any():
            self._replan(z, replan, plan, eval_mode)

        step = self._step(z, self._z_pred, self._actions, self._k, replan, self._history, self.teacher.task)
        self._z_pred, self._history = step.z_pred, step.history
        self._k = self._k + 1
        self._last = (due, replan, k, drift, step)
        return like(step.action, obs, self.teacher.model.config)  # type: ignore[return-value]

    @property
    def info(self) -> StepInfo | None:
        """What happened in the last `act`; None before the first."""
        if self._last is None:
            return None
        due, replan, k, drift, step = self._last
        later = Kind.OPEN_LOOP if self.corrector is None else Kind.CORRECTED
        # Without plans there is none to make, whatever ended the last one.
        first, again = (Kind.PLANNED, Kind.FALLBACK) if self.plan_length else (Kind.PRIOR, Kind.PRIOR)
        return StepInfo(
            kind=torch.where(due, first, torch.where(replan, again, later)),
            k=torch.where(due, 0, k),
            mismatch=drift.masked_fill(due, torch.nan),
            correction=(step.action - step.planned).norm(dim=-1),
        )

    def _drift(self, z: Tensor) -> Tensor:
        """What is held against the threshold `[B]`: how far the real latents are from those predicted."""
        return mismatch(z, self._z_pred)

    def _threshold(self) -> Tensor:
        """That of each row's step in plan `[B]`."""
        return self._thresholds[(self._k - 1).clamp(0, len(self._thresholds) - 1)]

    def _replan(self, z: Tensor, replan: Tensor, plan: Plan | None, eval_mode: bool) -> None:
        """Put the rows `replan` `[B]` bool at step 0 of a fresh plan."""
        if self.plan_length:
            rows = replan.nonzero().squeeze(1)
            if plan is None:
                plan = self.teacher.plan(z[rows], rows, self._k[rows], eval_mode=eval_mode)
            else:
                plan = Plan(*(x[rows] for x in plan))
            drawn = (self._k[rows] <= 1) | (not eval_mode)
            self._actions[rows] = self._followed(plan, drawn)
        self._z_pred = torch.where(replan[:, None], z, self._z_pred)
        self._k = self._k.masked_fill(replan, 0)

    def _followed(self, plan: Plan, drawn: Tensor) -> Tensor:
        """What is to be executed of plans just made `[R, H, A]`; `drawn` `[R]`: whose first action is drawn.

        Replanning step after step, it is what was drawn, as in TD-MPC2: that breaks ties between ways that
        are equally good. A plan that is followed is better off without the noise.
        """
        first = torch.where(drawn[:, None], plan.actions[:, 0], plan.mean[:, 0])
        return torch.cat([first[:, None], plan.mean[:, 1:]], 1)

    def _eager_step(
        self,
        z: Tensor,
        z_pred: Tensor,
        plan: Tensor,
        k: Tensor,
        replan: Tensor,
        history: History | None,
        task: Tensor | None,
    ) -> Step:
        """Execute step `k` `[B]` of the plans `[B, H, A]`, corrected where none was made now.

        Args:
            z: `[B, L]`, real latents.
            z_pred: `[B, L]`, predicted ones.
            plan: planned actions.
            k: step in plan.
            replan: `[B]`, where plans were made now.
            history: of earlier steps, where there is a corrector.
            task: `[B]`, indices of tasks, of a multi-task model.
        """
        model = self.teacher.model
        action = planned = self._planned_action(z, plan, k, task)
        if self.corrector is not None and history is not None:
            history = history.then(self.corrector.embed(z, z_pred, planned, k))
            action = self.corrector(history, planned)
            if self.config.refine_steps:
                action = self._refined(z, action, planned, task)
            if self._predicts:
                action = torch.where(replan[:, None], planned, action)
        if self._predicts:
            z_pred = model.next(z_pred, action, task)
        return Step(planned, action, z_pred, history)

    def _refined(self, z: Tensor, action: Tensor, planned: Tensor, task: Tensor | None) -> Tensor:
        """Corrected actions `[B, A]`, refined."""
        assert self.corrector is not None
        planner = self.teacher.planner
        return refine(
            self.teacher.model,
            z,
            action,
            planned,
            self.corrector.around,
            task,
            steps=self.config.refine_steps,
            discount=planner.discount,
            temperature=planner.config.temperature,
        )

    def _planned_action(self, z: Tensor, plan: Tensor, k: Tensor, task: Tensor | None) -> Tensor:
        """Planned actions `[B, A]`: the plan's own, past its end the prior's at the real latent.

        At the predicted one the prior would follow the model's errors.
        """
        model = self.teacher.model
        if not self.plan_length:
            return model.prior(z, task)
        in_plan = k < self.plan_length
        index = k.clamp(max=plan.shape[1] - 1)[:, None, None]
        planned = plan.gather(1, index.expand(-1, 1, plan.shape[2])).squeeze(1)
        if not torch.compiler.is_compiling() and in_plan.all():
            return planned
        return torch.where(in_plan[:, None], planned, model.prior(z, task))


def load_teacher(
    path: str | Path,
    *,
    device: str | torch.device = "cpu",
    num_envs: int = 1,
    seed: int = 0,
    task: int | str | None = None,
    compute: ComputeConfig | None = None,
    **unsaid: Unpack[Unsaid],
) -> TDMPC2:
    """The teacher of a checkpoint: an original `.pt` file or a folder of ours.

    Args:
        path: the checkpoint.
        device: to act on.
        num_envs: rows of the batch.
        seed: of the planner's noise.
        task: for a multi-task model, the name of a published task or the index of any; a folder of ours may
            say it itself.
        compute: precision of planning, and whether to compile; None for compiled, in the precision that the
            folder's evaluation was made with, or float32.
        unsaid: `vmin`, `vmax` and `simnorm_dim` of an original file, see `load_world_model`.

    Raises:
        CheckpointError: the checkpoint is missing, damaged, foreign or unsafe, or was made for another task.
        FileError: it may not be read.
        ConfigError: a setting cannot be.
    """
    model, planner, discount = read_teacher(path, device, **unsaid)
    return TDMPC2(
        model,
        planner,
        discount=discount,
        num_envs=num_envs,
        seed=seed,
        task=_index_of(task, model.config.num_tasks, path),
        compute=compute or saved_compute(path),
    )


def read_teacher(
    path: str | Path, device: str | torch.device = "cpu", **unsaid: Unpack[Unsaid]
) -> tuple[WorldModel, PlannerConfig, float]:
    """The world model of a checkpoint, and the planning budget and discount that go with it.

    An original file does not say: it stands for the published budget and episodes of 500 steps.
    """
    model = load_world_model(path, device, **unsaid)
    saved = saved_config(path)
    planner = published_budget(model.config.action_dim)
    if "planner" in saved:
        planner = saved_as(PlannerConfig, saved["planner"], path)
    return model, planner, saved.get("discount", discount_of(500))


def saved_compute(path: str | Path) -> ComputeConfig:
    """How a checkpoint wants to be computed with: an accelerated agent as it was evaluated, compiled."""
    saved = saved_config(path)
    return replace(COMPILED, precision=saved.get("precision", COMPILED.precision))


def load_agent(
    path: str | Path,
    device: str | torch.device = "cpu",
    *,
    num_envs: int = 1,
    seed: int = 0,
    task: int | str | None = None,
    compute: ComputeConfig | None = None,
    **unsaid: Unpack[Unsaid],
) -> "TDMPC2 | SpeculativeAgent":
    """The agent of a checkpoint: speculative where the folder says how, else the teacher itself.

        agent = tdmpc2.load_agent("pretrained/walker-walk")
        agent.reset()
        action = agent.act(obs)  # in [-1, 1], once an agent step

    In a loop of your own, observations have the order of entries, and actions the scale and the repeat, of
    the model's training: see `TDMPC2.act`. Processes that are forked off this one compute with one thread.

    Args and raises as `load_teacher`.
    """
    teacher = load_teacher(
        path, device=device, num_envs=num_envs, seed=seed, task=task, compute=compute, **unsaid
    )
    saved = saved_config(path)
    if "speculation" not in saved:
        return teacher
    return SpeculativeAgent(teacher, *read_mode(path, teacher.model))


def read_mode(path: str | Path, model: WorldModel) -> tuple[SpeculationConfig, BaseCorrector | None]:
    """The mode of execution that a checkpoint names, with its corrector; TEACHER where it names none.

    Args:
        path: the checkpoint.
        model: its world model.

    Raises:
        CheckpointError: the mode does not fit this version, or its corrector cannot be used.
    """
    saved = saved_config(path)
    if "speculation" not in saved:
        return TEACHER, None
    config = saved_as(SpeculationConfig, saved["speculation"], path)
    if not config.corrector:
        return config, None
    if config.corrector not in ARCHITECTURES:  # nor a path to somewhere else
        raise CheckpointError(f"{path} names a corrector {config.corrector!r}, which there is not")
    folder = Path(path) / "correctors" / config.corrector
    return config, load_corrector(folder, fingerprint(model), next(model.parameters()).device)


def _index_of(task: int | str | None, num_tasks: int, path: str | Path) -> int | None:
    """Index of the task that a checkpoint is opened for, in a multi-task model.

    Raises:
        CheckpointError: it was made for another task, or does not know the name.
    """
    saved = saved_config(path)
    if isinstance(task, str) and not num_tasks:
        if spelling(saved.get("task", task)) != spelling(task):
            raise CheckpointError(f"{path} was made for {saved['task']}; {task} is another task")
        return None
    own = saved.get("task_index")
    index = published_task_index(task, num_tasks) if isinstance(task, str) else task
    if own is not None and index not in (None, own):
        raise CheckpointError(
            f"{path} was made for {saved.get('task')}, task {own}; task={task} is another one, for which "
            "its correctors are not made: open the checkpoint that it was made from"
        )
    return own if index is None else index
