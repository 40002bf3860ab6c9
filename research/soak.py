"""How long does `act` take at worst? A long run of an agent that plans in the background.

    python research/soak.py agent=pretrained/walker-walk planner.num_samples=512 planner.iterations=6 \\
        planner.num_elites=64

Four runs of the agent: a loop that sleeps until the next tick of a clock of `hz`, as a robot's does; a loop
without a pause; the first again with a busy process on each core; and again while the planner's process is
killed now and then. After each `act`, a loop that only reads the clock runs for a millisecond. The longest
gap between two of its readings is the machine's own pause. A fifth run is this loop alone, for as long as a
step takes, beside a busy process on each core but one in place of the planner. Writes `results/soak.json`.
Run nothing else meanwhile.
`thread=true` plans in a thread of this process instead.
"""

import gc
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import joblib
import numpy as np
from rich.console import Console

from tdmpc2 import cli
from tdmpc2.agent import SpeculativeAgent
from tdmpc2.background import BackgroundAgent, in_background
from tdmpc2.background.plans import Answer, LaterPlanner, Request
from tdmpc2.background.process import PlannerProcess
from tdmpc2.checked import Checked, at_least
from tdmpc2.config import BudgetOverride
from tdmpc2.errors import ConfigError
from tdmpc2.evaluation.config import EpisodesConfig
from tdmpc2.evaluation.metrics import paired_ratio
from tdmpc2.files import write_json
from tdmpc2.loading import read_mode
from tdmpc2.progress import Progress
from tdmpc2.provenance import provenance
from tdmpc2.teacher import Teacher, open_teacher

SPIN = 1e-3  # seconds for which the clock is read after each step
BUSY = "while True: pass"


@dataclass(frozen=True, kw_only=True)
class SoakConfig(Checked):
    """What runs, and how long."""

    agent: str  # an accelerated agent
    hz: float = 50.0  # of the loop that sleeps
    sleeping_steps: int = 40_000
    tight_steps: int = 60_000
    busy_steps: int = 3_000
    clock_steps: int = 5_000  # of the clock alone
    kills: int = 20  # of the planner's process
    steps_a_kill: int = 300
    thread: bool = False  # plan in a thread
    out: str = "results/soak.json"
    planner: BudgetOverride = field(default_factory=BudgetOverride)
    evaluation: EpisodesConfig = field(  # whose return is compared with that of planning in the foreground
        default_factory=lambda: EpisodesConfig(seed=90_000)
    )

    def check_ranges(self) -> None:
        at_least(1, self, "hz", "kills", "steps_a_kill")
        at_least(1, self, "sleeping_steps", "tight_steps", "busy_steps", "clock_steps")


class InThread:
    """Plans in a thread, for comparison."""

    def __init__(self, agent: SpeculativeAgent):
        self._plan = LaterPlanner(agent)
        self._plan.warm_up()
        self._thread = ThreadPoolExecutor(1)
        self._made: Future[Answer] | None = None

    def is_free(self) -> bool:
        return self._made is None

    def is_planning(self) -> bool:
        return self._made is not None and not self._made.done()

    def ask(self, request: Request) -> None:
        self._made = self._thread.submit(self._plan, request)

    def answers(self, *, wait: bool = False) -> list[Answer]:
        if self._made is None or not (wait or self._made.done()):
            return []
        answer, self._made = self._made.result(), None
        return [answer]

    def close(self) -> None:
        self._thread.shutdown()


@contextmanager
def busy(processes: int) -> Iterator[None]:
    """Meanwhile so many processes compute."""
    with ExitStack() as stack:
        for _ in range(processes):
            process = stack.enter_context(subprocess.Popen([sys.executable, "-c", BUSY]))
            stack.callback(process.kill)
        yield


def memory(agent: BackgroundAgent) -> list[float]:
    """Resident MiB of this process and of the planner's (Linux)."""
    processes = ["self"] + ([str(agent.source.pid)] if isinstance(agent.source, PlannerProcess) else [])
    pages = [int(Path(f"/proc/{x}/statm").read_text().split()[1]) for x in processes]
    return [n * resource.getpagesize() / 2**20 for n in pages]


def pause(seconds: float) -> float:
    """The longest gap between two readings of the clock in `seconds`."""
    last, longest = time.perf_counter(), 0.0
    end = last + seconds
    while last < end:
        now = time.perf_counter()
        longest, last = max(longest, now - last), now
    return longest


def quantiles(ms: np.ndarray) -> dict[str, float]:
    return {f"p{q:g}": float(np.percentile(ms, q)) for q in (50, 99, 99.9, 99.99, 100)}


def clock(steps: int, hz: float, seconds: float, progress: Progress) -> dict[str, Any]:
    """The machine's pauses: read the clock for `seconds`, sleep until the next tick, `steps` times."""
    longest = []
    with progress.add("clock", steps, unit="steps") as stage:
        tick = time.perf_counter()
        for _ in range(steps):
            longest.append(pause(seconds))
            tick += 1 / hz
            time.sleep(max(tick - time.perf_counter(), 0))
            stage.advance()
    return {"steps": steps, "pause_ms": quantiles(1e3 * np.array(longest))}


def run(
    agent: BackgroundAgent,
    teacher: Teacher,
    seed: int,
    steps: int,
    hz: float | None,
    progress: Progress,
    steps_a_kill: int | None = None,
) -> dict[str, Any]:
    """Run `steps` steps; `hz`: of the clock; None: no pause. Kills the planner every `steps_a_kill` steps."""
    act, gap, plain, returns, sizes = [], [], [], [], []
    recovered: list[int] = []  # steps from a kill to the first plan that was asked for after it
    killed: int | None = None  # in this episode
    seen = {"asked": 0, "arrived": 0, "taken": 0}
    with closing(teacher.env()) as env, progress.add("steps", steps, unit="steps") as stage:
        over, total = True, 0.0
        for t in range(steps):
            if over:
                returns += [total] if t else []
                obs, _ = env.reset(seed=seed + len(returns))
                agent.reset()
                agent.prepare(obs)
                killed = None
                if t == 0:  # what has been loaded stays: garbage collection need not look at it again
                    gc.collect()
                    gc.freeze()
                tick, total = time.perf_counter(), 0.0
            if t % 5_000 == 0:
                sizes.append(memory(agent))
            if steps_a_kill and t % steps_a_kill == steps_a_kill // 2:
                assert isinstance(agent.source, PlannerProcess)
                os.kill(agent.source.pid, signal.SIGKILL)
                killed = t
            start = time.perf_counter()
            action = agent.act(obs)
            end = time.perf_counter()
            act.append(end - start)
            info = agent.info
            assert info is not None
            for name in seen:
                seen[name] += int(getattr(info, name))
            if killed is not None and info.taken and info.age < t - killed:
                recovered.append(t - killed)
                killed = None
            plain.append(not (info.asked or info.arrived))
            gap.append(pause(SPIN))
            obs, reward, terminated, truncated, _ = env.step(action)
            total, over = total + float(reward), terminated or truncated
            if hz is not None:
                tick += 1 / hz
                time.sleep(max(tick - time.perf_counter(), 0))
            stage.advance()
    ms, usual = 1e3 * np.array(act), 1e3 * np.array(act)[plain]
    return {
        "steps": steps,
        "hz": hz,
        "without_plan_ms_median": float(np.median(usual)),
        "act_ms": quantiles(ms),
        "pause_ms": quantiles(1e3 * np.array(gap)),
        "longest_acts": [
            {"step": int(t), "act_ms": ms[t], "pause_after_ms": 1e3 * gap[t]} for t in np.argsort(-ms)[:10]
        ],
        "plans": seen,
        "lead": agent.lead,
        "mean_return": float(np.mean(returns)) if returns else None,
        "late": int((ms > 1e3 / hz).sum()) if hz else None,  # actions that took longer than a step
        "steps_to_recover": recovered,
        "memory_mib": sizes,
    }


def returns_of(
    agent: SpeculativeAgent, teacher: Teacher, config: SoakConfig, progress: Progress
) -> np.ndarray:
    """Returns `[n]` of the episodes that both ways of planning run; at `config.hz` where plans need time."""
    seeds, returns = config.evaluation.seeds, []
    with closing(teacher.env()) as env, progress.add("episodes", len(seeds), unit="episodes") as stage:
        for seed in seeds:
            obs, _ = env.reset(seed=seed)
            agent.reset()
            total, over = 0.0, False
            while not over:
                tick = time.perf_counter() + 1 / config.hz
                obs, reward, terminated, truncated, _ = env.step(agent.act(obs))
                total, over = total + float(reward), terminated or truncated
                if isinstance(agent, BackgroundAgent):
                    time.sleep(max(tick - time.perf_counter(), 0))
            returns.append(total)
            stage.advance()
    return np.array(returns)


def main(config: SoakConfig) -> None:
    teacher = open_teacher(None, config.agent, config.planner)
    mode, corrector = read_mode(config.agent, teacher.model)
    seed = config.evaluation.seed
    agent = in_background(partial(teacher.agent, 1, seed), mode, corrector)
    if config.thread:
        planning = SpeculativeAgent(teacher.agent(1, seed), mode, corrector)
        agent = BackgroundAgent(teacher.agent(1, seed), mode, corrector, source=InThread(planning))
    if not isinstance(agent, BackgroundAgent):
        raise ConfigError(f"{config.agent} does not plan")
    result: dict[str, Any] = {}
    with Progress(Console()) as progress:
        result["sleeping"] = run(agent, teacher, seed, config.sleeping_steps, config.hz, progress)
        write_json(config.out, result)
        result["tight"] = run(agent, teacher, seed, config.tight_steps, None, progress)
        with busy(joblib.cpu_count()):
            result["busy"] = run(agent, teacher, seed, config.busy_steps, config.hz, progress)
        if not config.thread:
            steps, every = config.kills * config.steps_a_kill, config.steps_a_kill
            result["killed"] = run(agent, teacher, seed, steps, config.hz, progress, every)
        with busy(joblib.cpu_count() - 1):
            step = 1e-3 * result["sleeping"]["without_plan_ms_median"]
            result["clock"] = clock(config.clock_steps, config.hz, step, progress)
        write_json(config.out, result)
        background = returns_of(agent, teacher, config, progress)
        agent.close()
        foreground = SpeculativeAgent(teacher.agent(1, seed), mode, corrector)
        reference = returns_of(foreground, teacher, config, progress)
    ratio, low, high = paired_ratio(background, reference)
    result["return_ratio_to_foreground"] = {"ratio": ratio, "low": low, "high": high}
    about = {
        "config": asdict(config),
        "planner": asdict(teacher.planner),
        "precision": teacher.precision,
        "mode": asdict(mode),
        "provenance": provenance(),
    }
    write_json(config.out, {**result, **about})
    Console().print({name: result[name]["act_ms"] for name in result if "act_ms" in result[name]})
    Console().print(f"written to {Path(config.out)}")


if __name__ == "__main__":
    cli.run(SoakConfig, main)
