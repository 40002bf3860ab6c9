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

from collections.abc import Callable
from dataclasses import replace
from enum import IntEnum
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .config import EAGER, ComputeConfig, PlannerConfig, SpeculationConfig
from .corrector import BaseCorrector
from .errors import ConfigError, ObservationError
from .inference import AheadOfTime, Compiled, forks_have_one_thread
from .inputs import Array, like, read_mask, read_observation
from .monitor import Monitor
from .planner import NoiseSource, Plan, Planner, warm_start
from .step import PlanState, PlanStep, Step
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
        size = sum(p.numel() for p in self.model.parameters()) / 1e6
        return f"TDMPC2({self.num_envs} rows; {size:.1f}M parameters; {self.planner.config.in_words()})"

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
    """Executes several steps of each plan, corrects them, and replans when the mismatch is too large.

    With `refine_steps` the corrected action is refined (`refine`) before it is executed. The monitor ends a
    plan early.

    Args:
        teacher: plans, and tells the number of rows; it becomes the agent's own.
        config: the mode of execution.
        corrector: corrects the steps after the first; None executes them as planned.
        monitor: says when a plan is given up; None: where the mismatch is above `config.threshold`.
    """

    def __init__(
        self,
        teacher: TDMPC2,
        config: SpeculationConfig,
        corrector: BaseCorrector | None = None,
        monitor: Monitor | None = None,
    ):
        horizon = teacher.planner.config.horizon
        self.plan_length = horizon if config.plan_length is None else config.plan_length
        if not 0 <= self.plan_length <= horizon:
            raise ConfigError(f"plan_length={config.plan_length}: must be from 0 to the horizon, {horizon}")
        planner, model, n, device = teacher.planner, teacher.model, teacher.num_envs, teacher.device
        if config.iterations is not None:
            planner.config = replace(planner.config, iterations=config.iterations)
        self.teacher, self.config, self.corrector = teacher, config, corrector
        with torch.inference_mode(False):  # as in `TDMPC2`
            self.monitor = (monitor or Monitor(config.threshold)).to(device)
            self.step = PlanStep(model, corrector, config, self.plan_length, planner.config, planner.discount)
            z = torch.zeros(n, model.config.latent_dim, dtype=torch.float32, device=device)
            self._now = PlanState(
                z=z,
                z_pred=z,
                plan=z.new_zeros(n, horizon, model.config.action_dim),
                k=torch.full((n,), config.execution_horizon, device=device),
                history=None if corrector is None else corrector.no_history(n),
                task=teacher.task,
            )
        self._run: Callable[..., Step] = self.step
        if planner.compute.compile and corrector is not None and n == 1:
            # Without a corrector there is little to gain; nor in a larger batch, beside its planning.
            if device.type == "cpu":
                self._run = AheadOfTime(self.step, Step._make, what="the corrector")
            else:
                self._run = Compiled(self.step, what="the corrector", device=device)
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
        self._now.k[index] = self.config.execution_horizon  # a replan is due
        if self._now.history is not None:
            self._now.history.valid[index] = False

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
        now = self._now._replace(z=self.teacher.encode(obs))
        due = now.k >= self.config.execution_horizon
        measured, given_up = self.monitor(now, self.step)
        replan = due | given_up
        k = now.k
        if replan.any():
            now = self._replanned(now, replan, plan, eval_mode)
        step = self._run(now, replan)
        self._now = now._replace(z_pred=step.z_pred, k=now.k + 1, history=step.history)
        self._last = (due, replan, k, measured, step)
        return like(step.action, obs, self.teacher.model.config)  # type: ignore[return-value]

    @property
    def info(self) -> StepInfo | None:
        """What happened in the last `act`; None before the first."""
        if self._last is None:
            return None
        due, replan, k, measured, step = self._last
        later = Kind.OPEN_LOOP if self.corrector is None else Kind.CORRECTED
        # Without plans there is none to make, whatever ended the last one.
        first, again = (Kind.PLANNED, Kind.FALLBACK) if self.plan_length else (Kind.PRIOR, Kind.PRIOR)
        return StepInfo(
            kind=torch.where(due, first, torch.where(replan, again, later)),
            k=torch.where(due, 0, k),
            mismatch=measured.masked_fill(due, torch.nan),
            correction=(step.action - step.planned).norm(dim=-1),
        )

    def _replanned(self, now: PlanState, replan: Tensor, plan: Plan | None, eval_mode: bool) -> PlanState:
        """With the rows `replan` `[B]` bool at step 0 of a fresh plan."""
        if self.plan_length:
            rows = replan.nonzero().squeeze(1)
            if plan is None:
                plan = self.teacher.plan(now.z[rows], rows, now.k[rows], eval_mode=eval_mode)
            else:
                plan = Plan(*(x[rows] for x in plan))
            drawn = (now.k[rows] <= 1) | (not eval_mode)
            now.plan[rows] = self.followed(plan, drawn)
        z_pred = torch.where(replan[:, None], now.z, now.z_pred)
        return now._replace(z_pred=z_pred, k=now.k.masked_fill(replan, 0))

    def followed(self, plan: Plan, drawn: Tensor) -> Tensor:
        """What is to be executed of plans just made `[R, H, A]`; `drawn` `[R]`: whose first action is drawn.

        Replanning step after step, it is what was drawn, as in TD-MPC2: that breaks ties between ways that
        are equally good. A plan that is followed is better off without the noise.
        """
        first = torch.where(drawn[:, None], plan.actions[:, 0], plan.mean[:, 0])
        return torch.cat([first[:, None], plan.mean[:, 1:]], 1)
