"""Plans in the background: when they are asked for, where they start, and the process that makes them."""

import gc
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from stand_ins import Silence
from torch import Tensor

import tdmpc2
from tdmpc2.agent import TDMPC2, Kind, SpeculativeAgent
from tdmpc2.background import BackgroundAgent, in_background, process
from tdmpc2.background.plans import Answer, LaterPlanner, Request
from tdmpc2.config import CorrectorConfig, PlannerConfig, SpeculationConfig, WorldModelConfig
from tdmpc2.corrector import BaseCorrector, build_corrector
from tdmpc2.errors import ConfigError, ObservationError
from tdmpc2.planner import warm_start
from tdmpc2.world_model import WorldModel

H, L, A = 3, 16, 3
BUDGET = PlannerConfig(horizon=H, iterations=2, num_samples=16, num_elites=4, num_pi_trajs=4)
NEAR = (1e-3,)  # a threshold that only an exact prediction stays below


class Seen(WorldModel):
    """A model whose observations are latents."""

    def encode(self, obs: Tensor, task: Tensor | None = None) -> Tensor:
        return obs


def model_of(kind: type[WorldModel] = Seen) -> WorldModel:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        sizes: dict[str, Any] = dict(enc_dim=16, mlp_dim=16, latent_dim=L, num_q=3, num_bins=11)
        model = kind(WorldModelConfig((L,), A, **sizes)).eval().requires_grad_(False)
        for name, p in model.named_parameters():
            if "ln." not in name:
                p.normal_(0, 0.4)
    return model


MODEL = model_of()


@cache
def corrector_of(architecture: str) -> BaseCorrector | None:
    if not architecture:
        return None
    with torch.random.fork_rng():
        torch.manual_seed(2)
        corrector = build_corrector(CorrectorConfig(L, A, architecture, width=32, window=4))
        for p in corrector.parameters():
            p.data += 0.1 * torch.randn_like(p)
    return corrector.eval().requires_grad_(False)


def mode_of(**mode: Any) -> SpeculationConfig:
    return SpeculationConfig(**{"execution_horizon": 6, "threshold": NEAR, **mode})


class Slow:
    """Answers at the call after the `steps`-th call, or when it is waited for."""

    def __init__(self, agent: SpeculativeAgent, steps: int):
        self.agent, self.steps, self.waits = agent, steps, 0
        self.begun: list[Tensor] = []  # the latents that plans were made from
        plan = agent.teacher.plan
        agent.teacher.plan = lambda z, *which: self.begun.append(z) or plan(z, *which)  # type: ignore
        self.plan = LaterPlanner(agent)
        self.requests: list[Request] = []
        self.made: list[Answer] = []
        self.under_way: list[Answer] = []
        self.closed = self.loses = False

    def is_free(self) -> bool:
        return not self.under_way

    def ask(self, request: Request) -> None:
        assert self.is_free()
        self.requests.append(request)
        self.made.append(self.plan(request))
        self.under_way, self.left = [self.made[-1]], self.steps

    def answers(self, *, wait: bool = False) -> list[Answer]:
        self.waits += wait
        if not self.under_way:
            return []
        self.left -= 1
        if self.left > 0 and not wait:
            return []
        made, self.under_way = [] if self.loses else self.under_way, []
        return made

    def close(self) -> None:
        self.closed = True


def slow_agent(steps: int, num_envs: int = 1, delay: int | None = None, **mode: Any) -> BackgroundAgent:
    """Plans come `steps` steps after they were asked for."""
    config = mode_of(**mode)
    corrector = corrector_of(config.corrector)
    acting, planning = (TDMPC2(MODEL, BUDGET, num_envs=num_envs) for _ in range(2))
    source = Slow(SpeculativeAgent(planning, config, corrector), steps)
    planning.planner.noise = Silence()  # a row plans the same whoever is beside it
    return BackgroundAgent(acting, config, corrector, source=source, delay=delay)


def starts(*seeds: int) -> Tensor:
    """Latents `[B, L]`."""
    rows = [torch.randn(L, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack(rows).unflatten(-1, (-1, 8)).softmax(-1).flatten(-2)


class World:
    """Behaves exactly as the model predicts, but for jumps."""

    def __init__(self, agent: Any, *seeds: int):
        self.agent, self.z = agent, starts(*seeds)
        self.seen, self.actions, self.infos = [], [], []

    def steps(self, number: int) -> "World":
        for _ in range(number):
            self.seen.append(self.z.clone())
            self.actions.append(self.agent.act(self.z))
            self.infos.append(self.agent.info)
            self.z = MODEL.next(self.z, self.actions[-1])
        return self

    def jump(self, seed: int, row: int = 0) -> None:
        self.z[row] = starts(seed)[0]

    def when(self, what: str, row: int = 0) -> list[int]:
        """Steps in which the field `what` of `info` was True."""
        return [t for t, info in enumerate(self.infos) if getattr(info, what)[row]]

    def kinds(self, row: int = 0) -> str:
        return "".join(info.kinds[row].name[0] for info in self.infos)

    def ks(self, row: int = 0) -> list[int]:
        return [int(info.k[row]) for info in self.infos]


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


MODES: list[dict[str, Any]] = [
    {},
    {"corrector": "two_tower"},
    {"corrector": "temporal", "refine_steps": 1},
    {"corrector": "two_tower", "plan_length": 1},
]


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: "-".join(map(str, mode.values())) or "naive")
@pytest.mark.parametrize("delay", [1, 2, 5])
def test_a_plan_starts_where_the_agent_is_when_the_plan_is_due(delay: int, mode: dict[str, Any]) -> None:
    """Its latent is predicted along corrections, refining and the prior past the end of the present plan."""
    agent = slow_agent(1, delay=delay, **mode)
    world = World(agent, 3).steps(19)
    due = [0, 6, 12, 18]
    assert world.when("arrived") == world.when("taken") == due
    assert world.when("asked") == [0, *(t - delay for t in due[1:])]
    assert [int(world.infos[t].age) for t in due] == [0, *[delay] * 3]
    assert world.ks() == [t % 6 for t in range(19)]
    for t, begun, answer in zip(due, agent.source.begun, agent.source.made, strict=True):
        close(begun, world.seen[t])
        for k in range(min(H, 19 - t)):
            if not mode:
                close(world.actions[t + k], answer.plan[:, k])
    assert world.kinds() == ("P" + ("C" if mode else "O") * 5) * 3 + "P"


def test_a_row_plans_for_later_as_it_would_alone() -> None:
    together = World(slow_agent(1, 2, delay=2, corrector="temporal"), 3, 4).steps(14)
    for row in range(2):
        alone = World(slow_agent(1, delay=2, corrector="temporal"), 3 + row).steps(14)
        for a, b in zip(together.actions, alone.actions, strict=True):
            close(a[row], b[0])


def test_without_delay_it_is_the_usual_agent() -> None:
    make, mode = partial(TDMPC2, MODEL, BUDGET), mode_of(corrector="two_tower")
    agent = in_background(make, mode, corrector_of("two_tower"), delay=0)
    usual = SpeculativeAgent(make(), mode, corrector_of("two_tower"))
    assert type(agent) is SpeculativeAgent
    for a, b in zip(World(agent, 3).steps(9).actions, World(usual, 3).steps(9).actions, strict=True):
        assert torch.equal(a, b)


def test_a_fixed_delay_gives_the_same_actions_every_time() -> None:
    runs = []
    for _ in range(2):
        make, corrector = partial(TDMPC2, MODEL, BUDGET), corrector_of("two_tower")
        agent = in_background(make, mode_of(corrector="two_tower"), corrector, delay=3)
        assert isinstance(agent, BackgroundAgent) and agent.lead == 3
        world = World(agent, 3).steps(8)
        world.jump(5)
        runs.append(world.steps(8))
        assert runs[0].when("asked") == [0, 3, 8, 14], "a jump gives the second plan up"
        assert runs[0].when("taken") == [0, 6, 11] and runs[0].kinds().count("F") == 1
    for a, b in zip(runs[0].actions, runs[1].actions, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("plan_length", [None, 1])
@pytest.mark.parametrize("corrector", ["", "two_tower"])
def test_a_plan_that_is_given_up_is_executed_until_a_new_one_is_here(
    corrector: str, plan_length: int | None
) -> None:
    mode = {"corrector": corrector, "plan_length": plan_length, "execution_horizon": 20}
    agent, patient = slow_agent(1, delay=2, **mode), slow_agent(1, delay=2, **mode, threshold=None)
    world, other = (World(each, 3).steps(1) for each in (agent, patient))
    for each in (world, other):
        each.jump(5)
        each.steps(5)
    assert world.ks() == [0, 1, 2, 0, 1, 2] and other.ks() == [0, 1, 2, 3, 4, 5]
    assert world.when("asked") == [0, 1] and world.when("taken") == [0, 3]
    assert world.infos[3].kinds == [Kind.FALLBACK] and int(world.infos[3].age) == 2
    for t in range(3):
        close(world.actions[t], other.actions[t])
    close(agent.source.begun[1], world.seen[3])


@pytest.mark.parametrize("corrector", ["", "two_tower"])
def test_a_plan_for_another_latent_than_the_real_one_is_taken_too(corrector: str) -> None:
    """It is corrected, and its mismatch counts from the real latent on."""
    agent = slow_agent(1, delay=2, corrector=corrector)
    world = World(agent, 3).steps(6)
    world.jump(5)
    world.steps(6)
    arrived, answer = world.infos[6], agent.source.made[1]
    assert float(arrived.mismatch) > 0.1, "that of the old plan"
    assert arrived.arrived and arrived.taken and int(arrived.age) == 2 and int(arrived.k) == 0
    assert arrived.kinds == [Kind.PLANNED] and world.when("taken") == [0, 6]
    assert all(float(world.infos[t].mismatch) < 1e-3 for t in range(7, 12))
    z, expected = world.seen[6], answer.plan[:, 0]
    if (network := corrector_of(corrector)) is not None:
        step = network.embed(z, z, expected, torch.tensor([0]))
        expected = network(network.no_history(1).then(step), expected)
        assert float(arrived.correction) > 0.01
    close(world.actions[6], expected)


def test_a_late_plan_is_executed_from_the_step_that_is_due() -> None:
    agent = slow_agent(3)
    world = World(agent, 3).steps(17)
    answer = agent.source.made[1]
    close(agent.source.begun[1], world.seen[6])
    assert world.when("asked")[1:3] == [5, 9] and agent.lead == 3, "the next is asked for in time"
    assert world.when("arrived") == world.when("taken") == [0, 8, 12] and int(world.infos[8].age) == 3
    assert world.ks()[5:13] == [5, 6, 7, 2, 3, 4, 5, 0]
    close(world.actions[8], answer.plan[:, 2])
    close(world.infos[9].mismatch, torch.zeros(1))


def test_a_plan_that_comes_after_its_horizon_is_dropped_and_the_next_is_asked_for_earlier() -> None:
    agent = slow_agent(H + 1, threshold=None, execution_horizon=8)
    world = World(agent, 3).steps(12)
    assert world.when("asked") == [0, 7, 11], "the first comes at 11, and should have begun at 8"
    assert world.when("taken") == [0] and world.when("arrived") == [0, 11] and agent.lead == H + 1
    assert int(world.infos[11].age) == H + 1 and world.infos[11].kinds == [Kind.OPEN_LOOP]
    world.steps(5)
    assert world.when("taken") == [0, 15] and int(world.infos[15].k) == 0
    assert world.infos[15].kinds == [Kind.PLANNED], "no mismatch has forced it"
    close(agent.source.begun[2], world.seen[15])


def test_a_plan_that_was_needed_and_came_too_late_is_still_needed() -> None:
    """In the row where a mismatch asked for it; in the other row nothing has happened."""
    agent = slow_agent(H + 1, 2, execution_horizon=30)
    world = World(agent, 3, 4).steps(1)
    world.jump(5, row=0)
    world.steps(12)
    assert world.when("asked", 0) == [0, 1, 5] and world.when("asked", 1) == [0]
    assert world.when("arrived", 0) == [0, 5, 9] and world.when("taken", 0) == [0, 9]
    assert world.infos[9].kinds[0] == Kind.FALLBACK and int(world.infos[9].k[0]) == 0
    assert world.ks(1) == list(range(13))


def test_a_second_mismatch_while_a_plan_is_made_asks_for_no_other() -> None:
    agent = slow_agent(1, delay=4, execution_horizon=30)
    world = World(agent, 3).steps(1)
    for seed in (5, 6):
        world.jump(seed)
        world.steps(2)
    world.steps(8)
    assert world.when("asked") == [0, 1] and world.when("taken") == [0, 5]
    assert float(world.infos[3].mismatch) > 0.1 and float(world.infos[6].mismatch) < 1e-3


def test_the_lead_is_that_of_the_slowest_of_the_last_plans() -> None:
    agent = slow_agent(4, threshold=None, num_envs=5)
    world = World(agent, *range(5)).steps(12)
    assert agent.lead == 4
    agent.source.steps = 2
    while agent.lead == 4 and len(world.infos) < 100:
        world.steps(1)
    assert agent.lead == 2 and len(agent.source.made) >= 8, "plans of several rows made at once count as one"


def test_plans_that_are_always_too_late_are_reported_once(capsys) -> None:
    for steps, said in ((H + 5, 0), (H + 6, 1)):  # of an execution horizon of 6
        agent = slow_agent(steps, threshold=None, execution_horizon=6)
        World(agent, 3).steps(200)
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == said
    assert f"the last 8 plans took {H + 6} steps and more, too long to be used" in lines[0]


def test_a_plan_that_the_source_has_lost_is_asked_for_again() -> None:
    agent = slow_agent(2, threshold=None)
    world = World(agent, 3).steps(5)
    agent.source.loses = True
    world.steps(3)
    agent.source.loses = False
    world.steps(6)
    asked = world.when("asked")
    assert asked[:3] == [0, 5, 7]
    assert world.when("taken")[1] == 9 and world.infos[9].kinds == [Kind.PLANNED]


def test_without_a_first_plan_the_prior_acts() -> None:
    agent = slow_agent(1)
    agent.source.loses = True
    world = World(agent, 3).steps(1)
    assert world.infos[0].kinds == [Kind.PRIOR] and not world.infos[0].taken
    close(world.actions[0], MODEL.prior(world.seen[0]))
    agent.source.loses = False
    world.steps(4)
    assert world.when("taken")[0] == 1 and world.infos[1].kinds == [Kind.PLANNED]


def test_what_is_needed_while_the_source_is_busy_is_asked_for_as_soon_as_it_is_free() -> None:
    """Not only when the next plan would be due."""
    agent = slow_agent(4, 2, execution_horizon=30, delay=4)
    world = World(agent, 3, 4).steps(1)
    world.jump(5, row=0)
    world.steps(1)
    world.jump(6, row=1)
    world.steps(10)
    assert world.when("asked", 0) == [0, 1] and world.when("taken", 0) == [0, 5]
    assert world.when("asked", 1) == [0, 5] and world.when("taken", 1) == [0, 9]
    assert world.infos[9].kinds[1] == Kind.FALLBACK


def test_the_start_of_an_episode_in_one_row_does_not_disturb_another() -> None:
    """And the old episode leaves nothing: neither a plan under way nor a warm start."""

    def run(reset_at: int | None) -> World:
        agent = slow_agent(1, 2, delay=3, corrector="temporal")
        world = World(agent, 3, 4)
        for t in range(16):
            if t == reset_at:
                agent.reset([False, True])
                world.jump(9, row=1)
            world.steps(1)
        return world

    usual = run(None)
    alone = World(slow_agent(1, delay=3, corrector="temporal"), 9).steps(12)
    for reset_at in (1, 4, 6, 7):  # with and without a request under way, and as plans arrive
        world = run(reset_at)
        for t in range(16):
            close(world.actions[t][0], usual.actions[t][0])
            if t >= reset_at and t - reset_at < 12:
                close(world.actions[t][1], alone.actions[t - reset_at][0])
        assert world.when("arrived", 0) == usual.when("arrived", 0)
        assert world.infos[reset_at].age[1] == 0 and world.infos[reset_at].mismatch[1].isnan()


def test_an_answer_for_the_last_episode_is_dropped() -> None:
    agent = slow_agent(4)
    world = World(agent, 3).steps(7)
    assert agent.source.under_way
    agent.reset()
    world.jump(9)
    world.steps(2)
    assert len(agent.source.made) == 3
    close(agent.source.begun[2], world.seen[7])
    close(world.actions[7], agent.source.made[2].plan[:, 0])
    close(world.actions[8], agent.source.made[2].plan[:, 1])
    assert int(world.infos[7].age) == 0 and world.infos[7].taken


def test_the_warm_start_moves_by_the_steps_between_the_starts_of_plans(monkeypatch) -> None:
    agent = slow_agent(1, delay=2, execution_horizon=2)
    planner = agent.source.agent.teacher.planner
    plan, begun = planner.plan, []
    monkeypatch.setattr(planner, "plan", lambda z, mean, **how: begun.append(mean) or plan(z, mean, **how))
    world = World(agent, 3).steps(6)
    made = agent.source.made
    assert world.when("taken") == [0, 2, 4] and len(made) == 4
    assert not begun[0].any()
    for i in range(1, 4):
        close(begun[i], warm_start(made[i - 1].plan, torch.tensor([2])))
        assert begun[i].any()
    agent.reset()
    world.steps(1)
    assert not begun[4].any()


def test_an_agent_that_is_prepared_does_not_wait() -> None:
    agent = slow_agent(3)
    first = starts(3)
    agent.prepare(first)
    waits, requests = agent.source.waits, len(agent.source.requests)
    assert waits and requests == 1
    agent.prepare(first)
    world = World(agent, 3).steps(20)
    assert world.infos[0].taken and world.infos[0].asked and world.infos[0].kinds == [Kind.PLANNED]
    close(world.actions[0], agent.source.made[0].plan[:, 0])
    agent.prepare(first)  # in an episode there is nothing to prepare
    assert agent.source.waits == waits
    agent.reset()
    world.steps(1)
    assert agent.source.waits > waits, "without `prepare` the first action waits"


def test_it_takes_no_plan_and_does_not_explore() -> None:
    agent = slow_agent(1)
    plan = agent.source.agent.teacher.plan(starts(3))
    for wrong in ({"plan": plan}, {"eval_mode": False}):
        with pytest.raises(ConfigError, match="in the background takes no plan"):
            agent.act(starts(3), **wrong)
    assert agent.info is None and not agent.source.requests


def test_only_an_agent_that_executes_several_steps_of_plans_plans_in_the_background() -> None:
    for mode in ({"execution_horizon": 1}, {"execution_horizon": 1, "plan_length": 0}, {"plan_length": 0}):
        with pytest.raises(ConfigError, match="several steps of each plan"):
            slow_agent(1, **mode)
    make = partial(TDMPC2, MODEL, BUDGET)
    assert type(in_background(make, mode_of(plan_length=0))) is SpeculativeAgent
    original = Path(__file__).parent / "fixtures/official/state_small.pt"
    with pytest.raises(ConfigError, match=r"is a teacher.*tdmpc2 accelerate"):
        tdmpc2.load_agent(original, background=True)


@pytest.mark.parametrize("at", [0, 1, 4, 5, 6, 9])
def test_what_is_no_observation_changes_nothing(at: int) -> None:
    """Also not where a plan has just arrived."""
    mine, twin = slow_agent(1, delay=2, corrector="temporal"), slow_agent(1, delay=2, corrector="temporal")
    world, other = World(mine, 3).steps(at), World(twin, 3).steps(at)
    before = repr(mine.info)
    for bad, message in ((math.nan, "NaN"), (math.inf, "infinity")):
        with pytest.raises(ObservationError, match=message):
            mine.act(torch.full((1, L), bad))
        assert repr(mine.info) == before
    if at == 0:
        with pytest.raises(ObservationError):
            mine.prepare(torch.full((1, L), math.nan))
        assert not mine.source.requests
    world.steps(12)
    other.steps(12)
    for t in range(at, at + 12):
        assert torch.equal(world.actions[t], other.actions[t])
        assert repr(world.infos[t]) == repr(other.infos[t])


def test_modes_of_pytorch_around_anything_do_not_matter() -> None:
    expected = World(slow_agent(1, delay=2, corrector="temporal"), 3).steps(9)
    for around in (torch.inference_mode, partial(torch.device, "meta")):
        with around():
            agent = slow_agent(1, delay=2, corrector="temporal")
        given = [x.numpy() for x in expected.seen]
        for _ in range(2):
            for x, action in zip(given, expected.actions, strict=True):
                with around():
                    np.testing.assert_array_equal(agent.act(x), action.numpy())
                    assert not agent.info.k.is_meta
            with around():
                agent.reset()
            agent.source.agent.teacher.reset()


def test_a_warm_planner_has_planned_for_one_row_and_for_all(monkeypatch) -> None:
    """A batch has another library than one row, and to compile it takes longer than any patience."""
    agent = slow_agent(1, 3, corrector="temporal")
    planner, rows = agent.source.agent.teacher.planner, []
    plan = planner.plan
    monkeypatch.setattr(planner, "plan", lambda z, *a, **how: rows.append(len(z)) or plan(z, *a, **how))
    agent.source.plan.warm_up()
    assert sorted(rows) == [1, 3]
    rows.clear()
    World(agent, 3, 4, 5).steps(7)
    assert not agent.source.made[0].plan.isnan().any()


# From here on, plans are made in another process, which takes seconds to start. It cannot import this module
# fast, so its model is of the package.

OBS = np.random.default_rng(0).normal(size=(50, L)).astype(np.float32)
TIMEOUT = 100.0


def usual_agent() -> BackgroundAgent:
    make = partial(TDMPC2, model_of(WorldModel), replace(BUDGET, iterations=1))
    mode = SpeculationConfig(execution_horizon=4, corrector="two_tower")
    agent = in_background(make, mode, corrector_of("two_tower"))
    assert isinstance(agent, BackgroundAgent)
    return agent


@pytest.fixture(scope="module")
def agent() -> Iterator[BackgroundAgent]:
    agent = usual_agent()
    try:
        yield agent
    finally:
        agent.close()
    assert not lives(agent.source.pid)


def lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def until(condition: Callable[[], bool], seconds: float = TIMEOUT) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it takes too long"
        time.sleep(0.005)


def act_until_taken(agent: BackgroundAgent, number: int = 1) -> float:
    """Act until so many plans that were not waited for have been taken; returns the slowest action's time."""
    taken, slowest, t = 0, 0.0, 0

    def one() -> bool:
        nonlocal taken, slowest, t
        before = time.monotonic()
        agent.act(OBS[t % len(OBS)])
        slowest = max(slowest, time.monotonic() - before)
        assert agent.info is not None
        taken += bool(agent.info.taken and agent.info.age)
        t += 1
        return taken >= number

    until(one)
    return slowest


def told(capsys) -> list[str]:
    """What was said, but for what depends on the machine's speed."""
    return [line for line in capsys.readouterr().err.splitlines() if "too long to be used" not in line]


def files_and_memory(pid: int) -> tuple[int, float]:
    """Open files, and MB."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return len(os.listdir(f"/proc/{pid}/fd")), pages * os.sysconf("SC_PAGE_SIZE") / 1e6


needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")


@needs_proc
def test_plans_come_from_another_process(agent: BackgroundAgent) -> None:
    assert agent.source.pid != os.getpid() and lives(agent.source.pid)
    for _ in range(3):
        agent.reset()
        agent.prepare(OBS[0])
        before = time.monotonic()
        agent.act(OBS[0])
        assert time.monotonic() - before < 1
        assert agent.info.kinds == [Kind.PLANNED] and agent.info.age == 0 and agent.info.taken
        act_until_taken(agent, 3)
    assert 1 <= agent.lead < 1000


@needs_proc
def test_episodes_leave_nothing(agent: BackgroundAgent) -> None:
    sizes = []
    for episode in range(200):
        agent.reset()
        for x in OBS[:2]:
            agent.act(x)
        if episode in (49, 199):
            sizes.append([files_and_memory(pid) for pid in (os.getpid(), agent.source.pid)])
    for (files, memory), (more_files, more_memory) in zip(*sizes, strict=True):
        assert more_files == files and more_memory < memory + 10


@needs_proc
def test_the_agent_acts_on_when_its_planner_dies_or_is_stuck(
    agent: BackgroundAgent, monkeypatch, capsys
) -> None:
    agent.act(OBS[0])
    position = os.lseek(agent.source._work.fileno(), 0, os.SEEK_CUR)
    seen, slowest = [], 0.0

    def kill() -> None:
        seen.append(agent.source.pid)
        os.kill(seen[-1], signal.SIGKILL)
        until(lambda: not lives(seen[-1]))

    slowest = max(slowest, act_until_taken(agent, 2))
    for _ in range(3):  # the second and the third as they start
        kill()
        agent.act(OBS[0])
    monkeypatch.setattr(process, "PATIENCE", 0.5)
    monkeypatch.setattr(process, "SLOWER", 0.0)
    slowest = max(slowest, act_until_taken(agent, 2))
    said = told(capsys)
    assert len(said) == 3 and all("has ended (SIGKILL): another one starts" in line for line in said), said
    assert os.lseek(agent.source._work.fileno(), 0, os.SEEK_CUR) == position, "forks may start theirs too"
    monkeypatch.undo()
    stuck = agent.source.pid
    os.kill(stuck, signal.SIGSTOP)
    try:
        until(lambda: agent.act(OBS[0]) is not None and agent.source.pid != stuck)
        until(lambda: not lives(stuck))
    finally:
        if lives(stuck):
            os.kill(stuck, signal.SIGKILL)
    assert slowest < 1, "a start takes longer"
    said = told(capsys)
    assert len(said) == 1 and "does not answer: another one starts" in said[0], said


@needs_proc
def test_a_program_may_have_several(agent: BackgroundAgent, capsys) -> None:
    other = usual_agent()
    pid = other.source.pid
    try:
        act_until_taken(other, 2)
        act_until_taken(agent, 2)
        assert lives(pid) and lives(agent.source.pid) and pid != agent.source.pid
        other.close()
        assert not lives(pid)
        for x in OBS[:9]:
            other.act(x)
        assert not other.info.taken and other.source.pid == pid, "what is closed does not start again"
        other.close()
    finally:
        other.close()
    third = usual_agent()
    pid = third.source.pid
    assert lives(pid)
    del third
    gc.collect()
    assert not lives(pid)
    act_until_taken(agent, 2)
    assert not told(capsys)


def test_a_planner_that_cannot_start_is_given_up(monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    agent = usual_agent()
    for t in range(20):
        agent.act(OBS[t])
        assert agent.info.kinds == [Kind.CORRECTED if t % 10 else Kind.PRIOR] and not agent.info.arrived
        if t == 9:
            agent.reset()
            agent.prepare(OBS[0])
    said = capsys.readouterr().err.splitlines()
    assert ["another one starts" in line for line in said] == [True, True, False], said
    assert "(exit status 1) at each start: no plan is made any more" in said[2]
    agent.close()


@needs_proc
def test_a_system_short_of_processes_is_asked_again(agent: BackgroundAgent, monkeypatch, capsys) -> None:
    agent.act(OBS[0])
    real, tries = process.subprocess.Popen, []

    def short(*args: Any, **kwargs: Any) -> Any:
        tries.append(time.monotonic())
        if len(tries) < 3:
            raise OSError(11, "Resource temporarily unavailable")
        return real(*args, **kwargs)

    monkeypatch.setattr(process.subprocess, "Popen", short)
    monkeypatch.setattr(process, "RETRY", 0.1)
    os.kill(agent.source.pid, signal.SIGKILL)
    until(lambda: agent.act(OBS[0]) is not None and len(tries) == 3)
    assert (np.diff(tries) > 0.1).all(), "not at each action"
    act_until_taken(agent, 2)
    said = capsys.readouterr().err.splitlines()
    assert ["cannot start (Resource temporarily unavailable)" in line for line in said] == [False, True, True]


def test_a_planner_whose_start_never_ends_is_given_up(monkeypatch, capsys) -> None:
    monkeypatch.setattr(process, "START", 0.2)
    source = process.PlannerProcess(partial(time.sleep, 1e6))
    try:
        assert source.answers(wait=True) == [] and not source.is_free()
    finally:
        source.close()
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 3 and "does not answer at each start: no plan is made any more" in said[2], said


def test_the_error_of_a_planner_that_cannot_start_is_printed(monkeypatch, capfd) -> None:
    monkeypatch.setattr(process, "STARTS", 1)

    def make() -> SpeculativeAgent:
        raise ZeroDivisionError("the planner's own error")

    make.__module__ = "__main__"  # as in a script
    source = process.PlannerProcess(make)
    try:
        assert source.answers(wait=True) == [] and not source.is_free()
    finally:
        source.close()
    said = capfd.readouterr().err
    assert "ZeroDivisionError: the planner's own error" in said
    assert said.splitlines()[-1].startswith("the planner's process has ended (exit status 1) at each start")


SCRIPT = """
import os, signal, time
from functools import partial
import numpy as np
from tdmpc2.agent import TDMPC2
from tdmpc2.background import in_background
from tdmpc2.config import CorrectorConfig, PlannerConfig, SpeculationConfig, WorldModelConfig
from tdmpc2.corrector import TwoTowerCorrector
from tdmpc2.world_model import WorldModel

class Mine(TwoTowerCorrector):
    "The planner's process knows it by value."

sizes = dict(enc_dim=16, mlp_dim=16, latent_dim=16, num_q=3, num_bins=11)
model = WorldModel(WorldModelConfig((5,), 3, **sizes)).eval()
budget = PlannerConfig(horizon=3, iterations=1, num_samples=8, num_elites=4, num_pi_trajs=2)
mode = SpeculationConfig(execution_horizon=4, corrector="mine")
agent = in_background(partial(TDMPC2, model, budget), mode, Mine(CorrectorConfig(16, 3)).eval())

def act(plans):
    signal.alarm(120)  # whatever becomes of the test
    while True:
        agent.act(np.zeros(5))
        plans -= bool(agent.info.taken and agent.info.age)
        if plans == 0:
            return
        time.sleep(0.005)

act(plans=2)
mine = agent.source.pid
fork = os.fork()
act(plans=2)
if not fork:
    if os.fork():  # the other holds whatever files this one has
        print(os.getpid(), mine, agent.source.pid, flush=True)
        act(plans=-1)
    time.sleep(100)
act(plans=-1)
"""


@needs_proc
def test_a_planner_ends_with_its_program(tmp_path: Path) -> None:
    """A script without `if __name__ == "__main__"`, that forks; one is killed, the other gets a Ctrl-C."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    (tmp_path / "cwd").mkdir()
    (tmp_path / "cwd" / "numpy.py").write_text("raise ImportError('of the working directory')")
    run = subprocess.Popen(
        [sys.executable, script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        cwd=tmp_path / "cwd",
    )
    watchdog = threading.Timer(TIMEOUT, os.killpg, (run.pid, signal.SIGKILL))
    watchdog.start()
    planners = []
    try:
        assert run.stdout is not None
        line = run.stdout.readline()
        assert line, run.communicate()[1]
        fork, planner, of_fork = map(int, line.split())
        planners = [planner, of_fork]
        assert planner != of_fork and lives(planner) and lives(of_fork)
        os.kill(fork, signal.SIGKILL)
        until(lambda: not lives(of_fork), 20)
        time.sleep(0.2)
        assert lives(planner), "that of the other process"
        os.kill(run.pid, signal.SIGINT)
        run.wait(20)
        assert run.returncode == -signal.SIGINT
        until(lambda: not lives(planner), 1)
    finally:
        watchdog.cancel()
        with suppress(ProcessLookupError):
            os.killpg(run.pid, signal.SIGKILL)  # the fork that sleeps
        for pid in filter(lives, planners):
            os.kill(pid, signal.SIGKILL)
        said = run.communicate()[1]
    assert said.count("Traceback") == 1 and "KeyboardInterrupt" in said, said
