"""Acting: `TDMPC2` replans at every step; `SpeculativeAgent` executes several steps of each plan.

Both act for a batch of environments. Each row has its own episode, which begins with `reset(mask)`. One robot
is a batch of one; its observations and actions may leave the batch axis out.

The speculative agent keeps this state for each row. The example has execution horizon 4, planning horizon 3
and a corrector; `d` is the latent dynamics, `c` the corrector, `pi` the prior's mean:

    step in plan k   planned action   predicted latent     executed
    0                a0               z_0, the real one    a0, sampled if the last step was planned too
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
from .control import Arrival, Control, ControlStep
from .corrector import BaseCorrector
from .errors import ConfigError, ObservationError
from .inference import AheadOfTime, Compiled, forks_have_one_thread, threads
from .inputs import Array, like, read_mask, read_observation
from .monitor import Monitor
from .planner import NoiseSource, Plan, Planner, warm_start
from .step import PlanState, PlanStep
from .world_model.model import WorldModel


class Kind(IntEnum):
    """The kind of action that an agent executed."""

    PLANNED = 0  # the first action of a plan that was due
    CORRECTED = 1  # a later action of the plan, corrected
    OPEN_LOOP = 2  # a later action of the plan, unchanged
    FALLBACK = 3  # the first action of a new plan: the mismatch was above the threshold
    PRIOR = 4  # without a plan: the policy prior's action, or the corrector's


class StepInfo(NamedTuple):
    """What happened in the last `act`, per row."""

    kind: Tensor  # [B] long, values of Kind
    k: Tensor  # [B] long, step in plan; for a fallback, the step that was not executed
    mismatch: Tensor  # [B], before a new plan is taken; NaN where there was no plan, or a replan was due
    correction: Tensor  # [B], norm of executed minus planned action
    asked: Tensor  # [B] bool, a plan was asked for
    arrived: Tensor  # [B] bool, a plan's first step has come, or the plan came after it
    taken: Tensor  # [B] bool, it was taken; not if all its steps are over
    age: Tensor  # [B] long, steps since it was asked for

    @property
    def kinds(self) -> list[Kind]:
        """`kind` by name, e.g. `[Kind.PLANNED, Kind.CORRECTED]`."""
        return [Kind(kind) for kind in self.kind.tolist()]

    def __repr__(self) -> str:
        """`kind=CORRECTED, k=2, mismatch=0.25, ...`; lists for a larger batch."""
        columns = {"kind": [kind.name for kind in self.kinds]}
        columns |= {name: [f"{x:.4g}" for x in getattr(self, name).tolist()] for name in self._fields[1:]}
        return ", ".join(
            f"{name}={x[0] if len(x) == 1 else '[' + ', '.join(x) + ']'}" for name, x in columns.items()
        )


class TDMPC2:
    """The teacher: it plans at every step, from the warm start that the last plan left.

    Args:
        model: the world model, on the device to act on.
        planner: the planning budget.
        discount: per agent step.
        num_envs: rows of the batch.
        seed: of the planner's noise.
        task: index of the task, for a multi-task model.
        compute: precision and compilation of planning; encoding is always float32 and not compiled here.
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
        with torch.inference_mode(False):  # tensors made in inference mode cannot be changed outside it
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
        """What happened in the last `act`: every row was planned. None before the first `act`."""
        if not self._has_acted:
            return None
        nothing = torch.zeros(self.num_envs, dtype=torch.float32, device=self.device)
        kind, none, yes = nothing.long(), torch.full_like(nothing, torch.nan), nothing == 0
        return StepInfo(kind, kind, none, nothing, asked=yes, arrived=yes, taken=yes, age=kind)

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

        Your own loop must do what `tdmpc2.make_env` does: keep the order of observation entries in training
        (dm_control: the task's order, not sorted by name), scale actions from [-1, 1] to the actuators'
        ranges, and hold each for the training's action repeat (dm_control: 2 control steps). Call `reset`
        when an episode begins, then `act` once per agent step.

        Args:
            obs: an array, a tensor or a sequence of numbers. A tensor gives a tensor, all else an array.
                Pixels are uint8.
            eval_mode: False adds the planner's exploration noise.

        Raises:
            ObservationError: `obs` has another type or shape, or is not finite. The agent is unchanged.
        """
        action = self.plan(self.encode(obs), eval_mode=eval_mode).actions[:, 0]
        self._has_acted = True
        return like(action, obs, self.model.config)  # type: ignore[return-value]

    @torch.no_grad()
    def encode(self, obs: object) -> Tensor:
        """Latents `[B, L]` of observations `[B, *obs_shape]` or `[*obs_shape]`, checked as in `act`."""
        x = self.read(obs)
        z = self.model.encode(x, self.task)
        check_latent(z, x)
        return z

    def read(self, obs: object) -> Tensor:
        """Observations `[B, *obs_shape]` as the encoder takes them; checked, but for NaN."""
        return read_observation(obs, self.model.config, self.num_envs, self.device)

    @torch.no_grad()
    def plan(
        self,
        z: Tensor,
        rows: Tensor | None = None,
        executed: Tensor | None = None,
        *,
        eval_mode: bool = True,
    ) -> Plan:
        """Plan from latents `[R, L]`; keep the mean for the next warm start.

        Args:
            z: one latent per row.
            rows: `[R]` indices; None for all.
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

    With `refine_steps` it refines the corrected action (`refine`) before it executes it.

    Args:
        teacher: plans, and sets the number of rows; do not use it elsewhere.
        config: the mode of execution.
        corrector: corrects the steps after the first; None executes them as planned.
        monitor: says when a plan is given up; None: when the mismatch is above `config.threshold`.
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
            self._now = self.start()
            self._nothing = Arrival(torch.zeros(n, dtype=torch.bool, device=device), self._now.plan)
        control = ControlStep(self.step, self.monitor)
        self._run: Callable[..., Control] = control
        # Without a corrector there is little to gain. In a larger batch, planning takes most of the time.
        self.is_compiled = planner.compute.compile and corrector is not None and n == 1
        if self.is_compiled:
            if device.type == "cpu":
                self._run = AheadOfTime(control, Control._make, what="the control step")
            else:
                self._run = Compiled(control, what="the control step", device=device)
        # More threads than one gain little for one row, and wait for each other on a busy machine.
        self._threads = 1 if n == 1 and device.type == "cpu" else None
        self._last: tuple[Tensor, Tensor, Tensor, Control] | None = None  # for `info`

    def __repr__(self) -> str:
        return f"SpeculativeAgent({self.config.in_words()}; {self.teacher})"

    @property
    def num_envs(self) -> int:
        return self.teacher.num_envs

    def start(self) -> PlanState:
        """The state before the first observation: a plan is due in all rows."""
        model, n, device = self.teacher.model, self.num_envs, self.teacher.device
        z = torch.zeros(n, model.config.latent_dim, dtype=torch.float32, device=device)
        return PlanState(
            z=z,
            z_pred=z,
            plan=z.new_zeros(n, self.teacher.planner.config.horizon, model.config.action_dim),
            k=torch.full((n,), self.config.execution_horizon, device=device),
            history=None if self.corrector is None else self.corrector.no_history(n),
            task=self.teacher.task,
        )

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

        `info` then says what happened. `TDMPC2.act` says what your own loop must do.

        Args:
            obs: as in `TDMPC2.act`.
            plan: a plan for every row. Rows that replan use it; the teacher does not plan.
            eval_mode: False adds the planner's exploration noise to the first action of every plan. The
                other steps never explore.

        Raises:
            ObservationError: as in `TDMPC2.act`.
        """
        x, now, arrival = self.teacher.read(obs), self._now, self._nothing
        due = now.k >= self.config.execution_horizon
        if due.any():
            z = self.teacher.encode(obs) if self.plan_length else now.z
            arrival = self._with_plans(arrival, due, z, plan, eval_mode)
        done = first = self._control(x, now, arrival)
        if first.alarm:
            arrival = self._with_plans(arrival, first.given_up, first.z, plan, eval_mode)
            done = self._control(x, now, arrival)
        self._now = done.then(now)
        self._last = (due, now.k, first.measured, done)
        return like(done.action, obs, self.teacher.model.config)  # type: ignore[return-value]

    @property
    def info(self) -> StepInfo | None:
        """What happened in the last `act`; None before the first `act`."""
        if self._last is None:
            return None
        due, k, measured, done = self._last
        later = Kind.OPEN_LOOP if self.corrector is None else Kind.CORRECTED
        # An agent without plans cannot fall back: it makes none.
        first, again = (Kind.PLANNED, Kind.FALLBACK) if self.plan_length else (Kind.PRIOR, Kind.PRIOR)
        planned = done.taken & (self.plan_length > 0)
        return StepInfo(
            kind=torch.where(due, first, torch.where(done.taken, again, later)),
            k=torch.where(due, 0, k),
            mismatch=measured.masked_fill(due, torch.nan),
            correction=(done.action - done.planned).norm(dim=-1),
            asked=planned,
            arrived=planned,
            taken=planned,
            age=torch.zeros_like(k),
        )

    def _control(self, x: Tensor, now: PlanState, arrival: Arrival) -> Control:
        """One control step for observations `x`, checked."""
        with threads(self._threads):
            done = self._run(x, now, arrival)
        if done.alarm:
            check_latent(done.z, x)
        return done

    def _with_plans(
        self, arrival: Arrival, rows: Tensor, z: Tensor, plan: Plan | None, eval_mode: bool
    ) -> Arrival:
        """`arrival`, and new plans for `rows` `[B]` bool from their latents in `z` `[B, L]`."""
        here = arrival.here | rows
        if not self.plan_length:
            return arrival._replace(here=here)
        index = rows.nonzero().squeeze(1)
        k = self._now.k[index]
        if plan is None:
            made = self.teacher.plan(z[index], index, k, eval_mode=eval_mode)
        else:
            made = Plan(*(x[index] for x in plan))
        drawn = (k <= 1) | (not eval_mode)
        plans = arrival.plan.index_copy(0, index, self.followed(made, drawn))
        return arrival._replace(here=here, plan=plans)

    def followed(self, plan: Plan, drawn: Tensor) -> Tensor:
        """The actions `[R, H, A]` to execute of new plans: the mean plans.

        Rows where `drawn` `[R]` is True take their first action from the sampled plan, as TD-MPC2 does when
        it replans at every step: sampling breaks ties between equally good plans.
        """
        first = torch.where(drawn[:, None], plan.actions[:, 0], plan.mean[:, 0])
        return torch.cat([first[:, None], plan.mean[:, 1:]], 1)


def check_latent(z: Tensor, x: Tensor) -> None:
    """Raise ObservationError if latents `z` of observations `x` are not finite."""
    if not z.isfinite().all():
        fault = "is too large" if x.isfinite().all() else "holds NaN or infinity"
        raise ObservationError(f"observation {fault}: check the environment")
