"""A control loop at a fixed rate: deadline, reset, broken sensors, and what to log.

    python examples/robot_loop.py

`Robot` stands for your hardware: replace it by your driver, and keep the loop.
"""

import csv
import gc
import math
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import tdmpc2
from tdmpc2.config import ComputeConfig
from tdmpc2.errors import ObservationError

TASK = "cartpole-swingup"
FOLDER = Path(__file__).parents[1] / "pretrained" / TASK
COLUMNS = ["step", "kind", "k", "mismatch", "correction", "act_ms", "late_ms"]
FAULTS_IN_A_ROW = 10  # broken observations after which the robot stops

Floats = NDArray[np.float32]
Agent = tdmpc2.TDMPC2 | tdmpc2.SpeculativeAgent


class Robot:
    """A simulated robot. Now and then a sensor gives NaN, as a loose plug does."""

    def __init__(self, seed: int, faults: float = 0.02) -> None:
        self.env = tdmpc2.make_env(TASK, seed=seed)
        self.rng, self.faults = np.random.default_rng(seed), faults
        self.obs, _ = self.env.reset()

    def read(self) -> Floats:
        """The observation, entries in the order of the model's training."""
        if self.rng.random() < self.faults:
            return np.full_like(self.obs, np.nan)
        return self.obs

    def send(self, action: Floats) -> bool:
        """Execute an action, in [-1, 1]; returns whether the episode has ended."""
        self.obs, _, terminated, truncated, _ = self.env.step(action)
        return terminated or truncated

    def reset(self) -> None:
        """Bring the robot to where an episode begins."""
        self.obs, _ = self.env.reset()

    def stop(self) -> None:
        """Go to a safe state."""
        self.env.close()


def control(agent: Agent, robot: Robot, rate: float, steps: int, log: Path) -> list[tuple[str, float, float]]:
    """Act for `steps` steps at `rate` hertz, and write a row a step to `log`.

    Returns:
        For each step what it was, the time of `act` in ms, and how late the action was in ms.

    Raises:
        ObservationError: too many broken observations in a row. The robot is stopped.
    """
    period, faults = 1 / rate, 0  # seconds; broken observations in a row
    action = np.zeros(robot.env.action_space.shape or (), np.float32)
    happened: list[tuple[str, float, float]] = []
    begin(agent, robot)
    with open(log, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        deadline = time.perf_counter() + period
        for step in range(steps):
            began = time.perf_counter()
            try:
                action = agent.act(robot.read())
            except ObservationError:
                # The agent is as it was. Hold the last action: the mismatch of the next step will show
                # what this one missed, and the agent replans if it has to.
                faults += 1
                kind, k, mismatch, correction = "FAULT", -1, math.nan, math.nan
                if faults == FAULTS_IN_A_ROW:
                    robot.stop()
                    raise
            else:
                faults, info = 0, agent.info
                assert info is not None
                kind, k = info.kinds[0].name, int(info.k)
                mismatch, correction = info.mismatch.item(), info.correction.item()
            act_ms = 1000 * (time.perf_counter() - began)
            ended = robot.send(action)
            late = time.perf_counter() - deadline
            if late < 0:
                time.sleep(-late)
                deadline += period
            else:  # the robot held its last action meanwhile; do not hurry after the lost time
                deadline = time.perf_counter() + period
            late_ms = max(1000 * late, 0.0)
            writer.writerow([step, kind, k, mismatch, correction, act_ms, late_ms])
            happened.append((kind, act_ms, late_ms))
            if ended:
                robot.reset()
                begin(agent, robot)
                deadline = time.perf_counter() + period
    return happened


def begin(agent: Agent, robot: Robot) -> None:
    """Begin an episode. The robot stands still until its first plan is there."""
    agent.reset()
    if isinstance(agent, tdmpc2.BackgroundAgent):
        with suppress(ObservationError):  # a broken sensor: the first `act` waits instead
            agent.prepare(robot.read())


def main(
    rate: float = 50.0, steps: int = 500, log: Path = Path("robot_loop.csv"), compiled: bool = True
) -> None:
    """Control the robot, and print how long each kind of step took."""
    agent = tdmpc2.load_agent(FOLDER, compute=ComputeConfig(compile=compiled), background=True)
    robot = Robot(seed=0)
    # The first action loads or compiles. It must not fall into the loop.
    agent.act(np.zeros(robot.obs.shape, np.float32))
    # What has been loaded stays. Garbage collection need not look at it again, which takes 0.1 s and more.
    gc.collect()
    gc.freeze()
    happened = control(agent, robot, rate, steps, log)
    robot.stop()
    print(agent)
    for kind in dict.fromkeys(kind for kind, _, _ in happened):
        times = [act_ms for other, act_ms, _ in happened if other == kind]
        print(f"{kind:10} {len(times):4} steps, median {np.median(times):6.2f} ms, max {max(times):6.2f} ms")
    late = sum(late_ms > 0 for _, _, late_ms in happened)
    print(f"{late} of {steps} actions came after their deadline of {1000 / rate:.1f} ms; log: {log}")


if __name__ == "__main__":
    main()
