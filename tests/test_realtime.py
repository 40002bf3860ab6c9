"""Worlds that do not wait, on a clock that the tests move."""

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import gymnasium as gym
import numpy as np
import pytest

from tdmpc2.evaluation import realtime

SIMULATING = 0.3  # seconds that a step of the world takes


class Clock:
    """Stands still but for what moves it."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


class World(gym.Env):
    """Observes the number of its steps, and keeps the actions."""

    def __init__(self, clock: Clock, steps: int):
        self.clock, self.steps, self.actions = clock, steps, list[int]()

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[int, dict[str, Any]]:
        self.actions = []
        return 0, {}

    def step(self, action: int) -> tuple[int, float, bool, bool, dict[str, Any]]:
        self.clock.sleep(SIMULATING)
        self.actions.append(action)
        return len(self.actions), 1.0, False, len(self.actions) == self.steps, {}


class Agent:
    """Acts by the observation itself, after `seconds`."""

    def __init__(self, clock: Clock, seconds: float):
        self.clock, self.seconds = clock, seconds
        self.info = SimpleNamespace(taken=False)

    def reset(self) -> None:
        pass

    def act(self, obs: int) -> int:
        self.clock.sleep(self.seconds)
        self.info.taken = obs % 2 == 0
        return obs


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(realtime, "time", clock)
    return clock


@pytest.mark.parametrize(
    ("thinks", "executed"),
    [
        (0.9, [0, 1, 2, 3, 4, 5, 6, 7]),  # periods
        (1.25, [0, 0, 1, 1, 3, 3, 5, 5]),
        (2.5, [0, 0, 0, 1, 1, 1, 4, 4]),
    ],
)
def test_a_late_action_lets_the_world_go_on_with_the_one_before(clock, thinks, executed) -> None:
    world = World(clock, len(executed))
    found = realtime.episode(Agent(clock, thinks), world, 0, 1.0)  # type: ignore[arg-type]
    assert world.actions == executed, "each action names the step that was observed"
    assert found["length"] == found["return"] == len(executed)
    repeated = sum(a == b for a, b in pairwise(executed))
    assert found["late"] * len(executed) == pytest.approx(repeated)
    assert found["plans"] == sum(obs % 2 == 0 for obs in set(executed))
    assert [found["act_ms_median"], found["act_ms_max"]] == pytest.approx([1e3 * thinks] * 2)


def test_an_episode_may_end_with_its_first_step(clock: Clock) -> None:
    found = realtime.episode(Agent(clock, 9.0), World(clock, 1), 0, 1.0)  # type: ignore[arg-type]
    assert (found["length"], found["late"]) == (1, 0.0) and np.isnan(found["act_ms_max"])


def test_plans_in_the_background_get_a_period_for_each_step(clock: Clock, monkeypatch) -> None:
    """From one `act` to the next passes one period, with the time that the world takes."""
    monkeypatch.setattr(realtime, "BackgroundAgent", Agent)
    agent, begins = Agent(clock, 0.25), []
    agent.source = SimpleNamespace(is_planning=lambda: True)  # type: ignore[attr-defined]
    act = agent.act

    def seen(obs: int) -> int:
        begins.append(clock.now)
        return act(obs)

    agent.act = seen  # type: ignore[method-assign]
    realtime.episode(agent, World(clock, 6), 0, 1.0)  # type: ignore[arg-type]
    assert np.diff(begins[1:]) == pytest.approx(1.0)


def test_agents_stay_in_order_and_the_last_starts_first(clock: Clock) -> None:
    started = []

    def make(name: str) -> Agent:
        started.append(name)
        return Agent(clock, 0.1)

    agents: dict[str, Any] = {name: lambda name=name: make(name) for name in ("a", "b")}
    found = realtime.realtime(agents, lambda: World(clock, 3), (7, 8), (1.0, 2.0))
    assert started == ["b", "a"]
    assert list(found["agent"]) == ["a"] * 4 + ["b"] * 4
    assert list(found["seed"]) == [7, 8] * 4 and list(found["hz"]) == [1, 1, 2, 2] * 2
