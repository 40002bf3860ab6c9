"""The examples run, with few steps."""

import csv
import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import gymnasium as gym
import numpy as np
import pytest

import tdmpc2
from tdmpc2.config import EAGER
from tdmpc2.errors import ObservationError

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def example(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    registered = dict(gym.registry)
    monkeypatch.syspath_prepend(str(EXAMPLES))
    yield importlib.import_module(request.param)
    gym.registry.clear()
    gym.registry.update(registered)


@pytest.mark.parametrize("example", ["minimal"], indirect=True)
def test_minimal(example: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert len((EXAMPLES / "minimal.py").read_text().splitlines()) <= 150
    example.main(steps=13)
    lines = capsys.readouterr().out.splitlines()
    (baseline, none), (plans, fallbacks) = (re.findall(r"(\d+) plans, (\d+) of", line)[0] for line in lines)
    assert (baseline, none) == ("13", "0")
    # A plan lasts at most 6 steps: 13 steps take 3 plans, and a fallback makes one more at most.
    assert 3 <= int(plans) <= 3 + int(fallbacks) < 13


@pytest.mark.parametrize("example", ["minimal"], indirect=True)
def test_minimal_falls_back_above_the_threshold(example: ModuleType) -> None:
    model = tdmpc2.load_world_model(example.FOLDER)
    corrector = example.open_corrector(model)
    always = example.run(model, corrector, seed=1, steps=4, horizon=6, thresholds=[0.0] * 6)
    never = example.run(model, corrector, seed=1, steps=4, horizon=6, thresholds=[9.0] * 6)
    assert (always.plans, always.fallbacks) == (4, 3)
    assert (never.plans, never.fallbacks) == (1, 0)
    assert [len(m) for m in never.mismatches] == [0, 1, 1, 1, 0, 0]


@pytest.mark.parametrize("example", ["own_environment"], indirect=True)
def test_own_environment(example: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    example.main(steps=7)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(", ")[-1] for line in lines] == ["7 plans", "3 plans"]


class Recorded:
    """Stands for the robot: observations as given, and a record of what was sent."""

    def __init__(self, example: ModuleType, broken: set[int]) -> None:
        self.env = tdmpc2.make_env(example.TASK)
        self.obs, _ = self.env.reset()
        self.broken, self.read_calls, self.resets, self.stopped = broken, 0, 0, False
        self.sent: list[np.ndarray] = []

    def read(self) -> np.ndarray:
        self.read_calls += 1
        return np.full_like(self.obs, np.nan) if self.read_calls in self.broken else self.obs

    def send(self, action: np.ndarray) -> bool:
        self.sent.append(action)
        return len(self.sent) == 4

    def reset(self) -> None:
        self.resets += 1

    def stop(self) -> None:
        self.stopped = True


@pytest.mark.parametrize("example", ["robot_loop"], indirect=True)
def test_a_robot_holds_its_action_while_a_sensor_is_broken(example: ModuleType, tmp_path: Path) -> None:
    agent = tdmpc2.load_agent(example.FOLDER, compute=EAGER)
    robot, log = Recorded(example, broken={3}), tmp_path / "log.csv"
    happened = example.control(agent, robot, rate=1000.0, steps=5, log=log)
    assert [kind == "FAULT" for kind, _, _ in happened] == [False, False, True, False, False]
    same = [robot.sent[i] is robot.sent[i - 1] for i in range(1, 5)]
    assert same == [False, True, False, False], "each action of the agent is an array of its own"
    assert robot.resets == 1 and not robot.stopped
    with open(log) as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == list(range(5)) and rows[0]["kind"] == "PLANNED"
    assert all(late > 0 for kind, _, late in happened if kind == "PLANNED"), "no plan takes less than 1 ms"


@pytest.mark.parametrize("example", ["robot_loop"], indirect=True)
def test_a_robot_without_sensors_is_stopped(example: ModuleType, tmp_path: Path) -> None:
    agent = tdmpc2.load_agent(example.FOLDER, compute=EAGER)
    robot = Recorded(example, broken=set(range(2, 99)))
    with pytest.raises(ObservationError):
        example.control(agent, robot, rate=1000.0, steps=50, log=tmp_path / "log.csv")
    assert robot.stopped and len(robot.sent) == example.FAULTS_IN_A_ROW


@pytest.mark.parametrize("example", ["robot_loop"], indirect=True)
def test_a_loop_keeps_its_rate(example: ModuleType, tmp_path: Path, capsys) -> None:
    example.main(rate=4.0, steps=4, log=tmp_path / "log.csv", compiled=False)
    out = capsys.readouterr().out
    assert re.search(r"\d of 4 actions came after their deadline of 250\.0 ms", out)
    assert "PLANNED" in out
