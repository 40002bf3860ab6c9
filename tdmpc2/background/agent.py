"""An agent that acts while its next plan is made.

A plan is asked for `lead` steps before it is due, or when the monitor gives the present one up. It is made
for the latent that the model predicts for its first step. Meanwhile the agent goes on with the plan that it
has, corrected and refined; past that plan's end, the policy prior extends it. When the new plan's first step
has come, the agent takes it.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..agent import TDMPC2, Kind, SpeculativeAgent, StepInfo
from ..config import SpeculationConfig
from ..control import Ahead, Arrival, Control
from ..corrector import BaseCorrector
from ..errors import ConfigError
from ..inference.compiled import say
from ..inputs import Array, like, read_mask
from ..monitor import Monitor
from ..planner import Plan
from ..step import PlanState
from .plans import Answer, LaterPlanner, Request

REMEMBERED = 8  # plans whose longest time sets the lead


class Source(Protocol):
    """Makes plans, one request after the other."""

    def is_free(self) -> bool:
        """Whether it takes a request now. If so, it has none under way."""

    def ask(self, request: Request) -> None:
        """Begin to plan."""

    def is_planning(self) -> bool:
        """Whether a request is under way that has no answer yet."""

    def answers(self, *, wait: bool = False) -> list[Answer]:
        """Plans made since the last call; `wait`: until it is free."""

    def close(self) -> None:
        """End planning."""


class Simulated:
    """Plans at once. An agent with a fixed `delay` takes the plan that many steps later.

    Args:
        agent: plans. It is not the agent that acts.
    """

    def __init__(self, agent: SpeculativeAgent):
        self._plan = LaterPlanner(agent)
        self._made: list[Answer] = []

    def is_free(self) -> bool:
        return True

    def is_planning(self) -> bool:
        return False

    def ask(self, request: Request) -> None:
        self._made.append(self._plan(request))

    def answers(self, *, wait: bool = False) -> list[Answer]:
        made, self._made = self._made, []
        return made

    def close(self) -> None:
        """Nothing is left to end."""


class News(NamedTuple):
    """What happened to a row's plans in one step."""

    fresh: bool = False  # the episode began
    asked: bool = False
    arrived: bool = False
    age: int = 0  # steps since it was asked for
    forced: bool = False  # it was asked for because of a mismatch
    missed: bool = False  # it came after its last step


@dataclass
class Row:
    """The plans of one row's episode; times are steps of the episode."""

    t: int = 0
    number: int = 0  # of the request under way, or of the plan in `ready`; 0: none
    asked: int = 0  # when the last plan was asked for
    start: int | None = None  # when that plan begins
    forced: bool = False  # because of a mismatch, a plan is needed, or has been asked for
    again: bool = False  # there is no first plan, or the last one was lost or came too late
    ready: Tensor | None = None  # the plan [H, A] that waits for its start


class BackgroundAgent(SpeculativeAgent):
    """Acts without waiting for plans, but for the first plan of an episode.

    Args:
        teacher: as for `SpeculativeAgent`.
        config: as for `SpeculativeAgent`.
        corrector: as for `SpeculativeAgent`.
        monitor: as for `SpeculativeAgent`.
        source: makes the plans.
        delay: steps that a plan takes; None: as many as the slowest of the last plans.
    """

    def __init__(
        self,
        teacher: TDMPC2,
        config: SpeculationConfig,
        corrector: BaseCorrector | None = None,
        monitor: Monitor | None = None,
        *,
        source: Source,
        delay: int | None = None,
    ):
        super().__init__(teacher, config, corrector, monitor)
        if not self.plan_length or config.execution_horizon == 1:
            raise ConfigError(
                "only an agent that executes several steps of each plan can plan in the background"
            )
        self.source, self.delay = source, delay
        self._rows = [Row() for _ in range(teacher.num_envs)]
        self._took: deque[int] = deque(maxlen=REMEMBERED)  # steps that the last plans took
        self._has_warned = False  # that plans take too long
        self._number = 0  # of the last request
        self._horizon = teacher.planner.config.horizon
        with torch.inference_mode(False):  # as in `TDMPC2`
            none = torch.zeros_like(self._now.k)
            # A row that begins without a plan is at a plan's end.
            self._nothing = self._nothing._replace(ahead=Ahead(none + self._horizon, none))
        self._done: Control | None = None  # of the last `act`
        self._news: list[News] = []  # of the last `act`, for each row

    def __repr__(self) -> str:
        return f"BackgroundAgent({self.config.in_words()}; {self.teacher})"

    @property
    def lead(self) -> int:
        """Steps from asking for a plan to its first step: at most `K`, whatever one slow plan took."""
        return self.delay or min(max(self._took, default=1), self.config.execution_horizon)

    def reset(self, mask: object = None) -> None:
        """Begin an episode in the rows where `mask` `[B]` is True (or 1), or in all.

        A plan that was asked for before is dropped when it arrives.

        Raises:
            ConfigError: the mask has another shape, or other values.
        """
        super().reset(mask)
        index = read_mask(mask, self.num_envs, "cpu")
        for i in torch.arange(self.num_envs, device="cpu")[index].tolist():
            self._rows[i] = Row()

    @torch.inference_mode(False)
    @torch.no_grad()
    def prepare(self, obs: Array) -> None:
        """Plan for the first step of episodes, and wait for it, so that the first `act` need not.

        Also compile what is not compiled yet.

        Args:
            obs: as in `act`; the robot should not move until then.

        Raises:
            ObservationError: as in `act`.
        """
        rows = [i for i, row in enumerate(self._rows) if row.t == 0 and row.ready is None]
        if not rows:
            return
        z = self._control(self.teacher.read(obs), self._now, self._nothing).z
        self._take(self.source.answers(wait=True))
        if self.source.is_free():
            now = self._now._replace(z=z)
            self._ask(rows, now, torch.zeros_like(now.plan[:, 0]), lead=0)
            self._take(self.source.answers(wait=True))

    @torch.inference_mode(False)
    @torch.no_grad()
    def act(self, obs: Array, plan: Plan | None = None, *, eval_mode: bool = True) -> Array:
        """Action `[B, A]` float32 in [-1, 1] for observations `[B, *obs_shape]`, or both without B.

        Only the first `act` of an episode waits for a plan, unless `prepare` did.

        Args:
            obs: as in `TDMPC2.act`.
            plan: must be None: plans come from the source.
            eval_mode: must be True: plans in the background do not explore.

        Raises:
            ConfigError: an argument has another value.
            ObservationError: as in `TDMPC2.act`.
        """
        if plan is not None or not eval_mode:
            raise ConfigError("planning in the background takes no plan and no eval_mode=False")
        x, now = self.teacher.read(obs), self._now
        self._take(self.source.answers())
        if any(row.t == 0 and row.ready is None for row in self._rows):
            self.prepare(obs)
        arrival, news = self._arrival()
        done = self._control(x, now, arrival)
        self._now, self._done, self._news = done.then(now), done, news
        self._after(done)
        return like(done.action, obs, self.teacher.model.config)  # type: ignore[return-value]

    @property
    def info(self) -> StepInfo | None:
        """What happened in the last `act`; None before the first `act`."""
        if self._done is None:
            return None
        done = self._done
        fresh, asked, arrived, age, forced, _ = (
            torch.tensor(x, device=done.k.device) for x in zip(*self._news, strict=True)
        )
        later = Kind.OPEN_LOOP if self.corrector is None else Kind.CORRECTED
        kind = torch.where(forced, Kind.FALLBACK, torch.where(arrived, Kind.PLANNED, Kind.PRIOR))
        return StepInfo(
            kind=torch.where(done.taken, kind, later),
            k=done.k,
            mismatch=done.measured.masked_fill(fresh, torch.nan),
            correction=(done.action - done.planned).norm(dim=-1),
            asked=asked,
            arrived=arrived,
            taken=done.taken & arrived,
            age=age,
        )

    def close(self) -> None:
        """End planning in the background. Later actions come without new plans."""
        self.source.close()

    def _take(self, answers: Sequence[Answer]) -> None:
        """Keep plans until their first step has come."""
        for answer in answers:
            steps = []  # that this plan took
            for i, plan in zip(answer.rows.tolist(), answer.plan, strict=True):
                row = self._rows[i]
                if row.number != answer.number:  # an episode began meanwhile
                    continue
                row.ready = plan
                steps.append(row.t - row.asked)
            if any(steps):  # not those of an episode's first plan, which the agent waits for
                self._took.append(max(steps))
                self._warn()

    def _warn(self) -> None:
        """Say once that plans take too long."""
        too_long = self.config.execution_horizon + self._horizon
        if not self._has_warned and len(self._took) == REMEMBERED and min(self._took) >= too_long:
            self._has_warned = True
            say(
                f"the last {REMEMBERED} plans took {min(self._took)} steps and more, too long to be used: "
                "give a smaller planning budget, or act at a lower frequency"
            )

    def _arrival(self) -> tuple[Arrival, list[News]]:
        """The plans whose first step is now or, if they are late, was before."""
        news, come = [], []
        for i, row in enumerate(self._rows):
            fresh = row.t == 0
            late = -1 if row.ready is None or row.start is None else row.t - row.start
            arrived, missed = late >= 0, late >= self._horizon
            age = row.t - row.asked if arrived else 0
            news.append(News(fresh, fresh and row.number > 0, arrived, age, arrived and row.forced, missed))
            if fresh or (arrived and not missed):
                come.append(i)
        if not come:
            return self._nothing, news
        here, plans, ahead = self._nothing
        assert ahead is not None
        here, plans, ahead = here.clone(), plans.clone(), Ahead(*(x.clone() for x in ahead))
        here[come] = True
        for i in come:
            row = self._rows[i]
            if row.ready is not None and row.start is not None:
                plans[i], ahead.k[i], ahead.age[i] = row.ready, row.t - row.start, news[i].age
        return Arrival(here, plans, ahead), news

    def _after(self, done: Control) -> None:
        """Ask for the plans that are needed next."""
        free, lead = self.source.is_free(), self.lead
        given_up, k = done.given_up.tolist(), done.k.tolist()
        asking = []
        for i, (row, news) in enumerate(zip(self._rows, self._news, strict=True)):
            if news.arrived:
                row.forced, row.again = False, news.missed
                row.number, row.ready = 0, None
            elif news.fresh or (row.number and row.ready is None and free):  # the source has lost it
                row.again, row.number = True, 0
            row.forced |= given_up[i] and not row.number
            due = k[i] + lead >= self.config.execution_horizon
            if free and not row.number and (due or row.forced or row.again):
                asking.append(i)
        if asking:
            self._ask(asking, self._now, done.action, lead)
        for i in asking:
            self._news[i] = self._news[i]._replace(asked=True)
        for row in self._rows:
            row.t += 1

    def _ask(self, rows: list[int], now: PlanState, action: Tensor, lead: int) -> None:
        """Ask for plans for `rows` that begin `lead` steps from now."""
        self._number += 1
        executed = []
        for i in rows:
            row = self._rows[i]
            start = row.t + lead
            executed.append(self._horizon if row.start is None else start - row.start)
            row.number, row.asked, row.start = self._number, row.t, start
            row.again = False
        index = torch.tensor(rows, device=action.device)
        steps = torch.tensor(executed, device=action.device)
        self.source.ask(Request(self._number, index, lead, action[index], now.rows(index), steps))
