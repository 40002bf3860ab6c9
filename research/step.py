"""How much of a step without a plan is matrix products?

    python research/step.py agent=pretrained/walker-walk

Times, with one thread, `act`, its compiled library alone, and the library's matrix products alone: the same
operations on the same weights, one after the other. All three take turns. Each is also timed in a loop that
sleeps until the next tick, as a robot's does. Writes `results/step.json`.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from refining import value
from rich.console import Console
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from tdmpc2 import cli
from tdmpc2.agent import TDMPC2, SpeculativeAgent
from tdmpc2.checked import Checked, at_least
from tdmpc2.control import ControlStep
from tdmpc2.files import write_json
from tdmpc2.loading import open_checkpoint, read_mode
from tdmpc2.provenance import provenance

PRODUCTS = {"mm", "addmm", "bmm", "baddbmm"}


@dataclass(frozen=True, kw_only=True)
class StepConfig(Checked):
    """What is timed."""

    agent: str  # an accelerated agent
    refine_steps: tuple[int, ...] = (0, 1, 3)  # steps that refining looks ahead
    rows: tuple[int, ...] = (16,)  # actions that it values
    steps: int = 2_000  # timed, of each
    hz: float = 50.0  # of the loop that sleeps
    sleeping_steps: int = 500
    out: str = "results/step.json"

    def check_ranges(self) -> None:
        at_least(1, self, "steps", "hz", "sleeping_steps")


class Products(TorchDispatchMode):
    """Records the matrix products of what runs in it."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Callable[[], Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in PRODUCTS:
            held = tree_map(lambda x: x.detach() if isinstance(x, torch.Tensor) else x, args)
            self.calls.append(partial(func, *held, **(kwargs or {})))
        return func(*args, **(kwargs or {}))


def taken(run: Callable[[], Any]) -> float:
    """Seconds that `run` takes."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


@torch.no_grad()
def measure(config: StepConfig, refine_steps: int, rows: int) -> dict[str, float]:
    """Median times in ms of a step that refines so far ahead, over so many actions."""
    value(rows)
    opened = open_checkpoint(config.agent)
    mode, corrector = read_mode(config.agent, opened.model)
    mode = replace(mode, execution_horizon=10**6, threshold=None, refine_steps=refine_steps)
    teacher = TDMPC2(opened.model, opened.planner, compute=opened.compute)
    agent = SpeculativeAgent(teacher, mode, corrector)
    obs = np.random.default_rng(0).normal(size=opened.model.config.obs_shape).astype(np.float32)
    for _ in range(20):
        agent.act(obs)
    library: Any = agent._run
    x, now, arrival = agent.teacher.read(obs), agent._now, agent._nothing
    with Products() as products:
        ControlStep(agent.step, agent.monitor)(x, now, arrival)

    def multiply() -> None:
        for call in products.calls:
            call()

    timed: dict[str, Callable[[], Any]] = {
        "act": lambda: agent.act(obs),
        "library": lambda: library(x, now, arrival),
        "products": multiply,
    }
    times: dict[str, list[float]] = {name: [] for name in timed}
    for name, run in timed.items():  # in turn, in blocks: warm, as in a loop
        for _ in range(3):
            run()
        times[name] = []
    for _ in range(config.steps // 100):
        for name, run in timed.items():
            run()
            times[name] += [taken(run) for _ in range(100)]
    for name, run in timed.items():
        times[f"{name}, sleeping"] = sleeping = []
        for _ in range(config.sleeping_steps):
            sleeping.append(taken(run))
            time.sleep(max(1 / config.hz - sleeping[-1], 0))
    return {
        "refine_steps": refine_steps,
        "rows": rows,
        "number_of_products": len(products.calls),
        **{name: 1e3 * float(np.median(t)) for name, t in times.items()},
    }


def main(config: StepConfig) -> None:
    torch.set_num_threads(1)
    searches = [(n, rows) for n in config.refine_steps for rows in (config.rows if n else (0,))]
    found = [measure(config, *search) for search in searches]
    write_json(
        config.out, {"rows": found, "hz": config.hz, "agent": config.agent, "provenance": provenance()}
    )
    for row in found:
        Console().print(row)


if __name__ == "__main__":
    cli.run(StepConfig, main)
