"""Measure how fast this machine plans, acts and learns, and how far that is from its limit.

    python research/bench.py                                 everything, into results/bench.json
    python research/bench.py only=[planner] sizes=[5] batches=[1]

Each benchmark is a function of the settings that yields measurements: functions that return a record (see
measure.py). Each is made in a process of its own, as a user's agent has one: what the one before has left in
memory and in the compiler slows a plan by up to a quarter.
"""

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from flops import plan_flops, update_flops
from measure import Record, ceiling, ceiling_cases, measure
from reference import ReferenceUpdate, reference_plan
from rich.console import Console
from rich.table import Table

from tdmpc2 import TDMPC2, SpeculativeAgent, WorldModel, cli
from tdmpc2.config import (
    COMPILED,
    MODEL_SIZES,
    ComputeConfig,
    CorrectorConfig,
    PlannerConfig,
    SpeculationConfig,
    UpdateConfig,
    WorldModelConfig,
)
from tdmpc2.corrector import BaseCorrector, build_corrector, save_corrector
from tdmpc2.errors import ConfigError
from tdmpc2.files import write_json
from tdmpc2.inference import dtype_of, resolved
from tdmpc2.planner import NoiseSource, Planner
from tdmpc2.provenance import provenance
from tdmpc2.training.trainer import TrainConfig, Trainer, TrainPlannerConfig
from tdmpc2.training.update import Batch, Update
from tdmpc2.world_model import fingerprint, save_world_model

OBS_DIM, ACTION_DIM, DISCOUNT = 24, 6, 0.99  # those of walker-walk
FIRST_ACTION = """
import sys, torch, tdmpc2
agent = tdmpc2.load_agent(sys.argv[1], sys.argv[2])
agent.act(torch.zeros(int(sys.argv[3])))
print(flush=True)
"""
Measurement = Callable[[], Record]
OBSERVATIONS, TIMED = 1000, 2000  # observations that differ; steps that are timed at least
NEVER_AGAIN = 1_000_000  # steps of a plan, more than are measured
SMALLEST = PlannerConfig(iterations=1, num_samples=32, num_elites=8, num_pi_trajs=4)


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """What is measured, and where the results go."""

    only: tuple[str, ...] = ()  # names of benchmarks; none: all
    sizes: tuple[int, ...] = (1, 5, 19)  # millions of parameters
    batches: tuple[int, ...] = (1, 16)  # latents planned from at once
    precisions: tuple[str, ...] = ("float32", "bfloat16")
    compile: bool = True
    device: str = "cpu"
    threads: int = 0  # of PyTorch on a CPU; 0: its own choice
    seconds: float = 10.0  # of measuring, for each record: a shared machine has slow seconds
    memory_steps: int = 100_000
    out: str = "results/bench.json"
    planner: PlannerConfig = field(default_factory=PlannerConfig)


def planner(config: BenchConfig) -> Iterator[Measurement]:
    """One plan, for every size, precision and batch."""
    for size, precision, batch in product(config.sizes, config.precisions, config.batches):
        yield partial(plan_record, size, ComputeConfig(precision, config.compile), batch, config)


def plan_record(size: int, compute: ComputeConfig, batch: int, config: BenchConfig) -> Record:
    model = random_model(size).to(config.device)
    noise = NoiseSource(0, config.device)
    ours = Planner(model, config.planner, DISCOUNT, noise, compute)
    z = model.encode(torch.randn(batch, OBS_DIM, device=config.device))
    plain = {}
    if config.device == "cpu":
        plain["reference"] = lambda: reference_plan(model, config.planner, DISCOUNT, noise, z[0])
    record = against_limit(
        {"plan": lambda: ours.plan(z), **plain},
        flops=plan_flops(model.config, config.planner, batch),
        dtype=dtype_of(compute, z.device),
        size=size,
        batch=batch,
        config=config,
    )
    if record.speedup_over_reference is None:
        return record
    # The reference plans from one latent at a time.
    return replace(record, speedup_over_reference=batch * record.speedup_over_reference)


def against_limit(
    cases: dict[str, Callable[[], object]],
    *,
    flops: int,
    dtype: torch.dtype,
    size: int,
    batch: int,
    config: BenchConfig,
) -> Record:
    """The first case in turns with the others and the machine's ceiling; a `reference` is what it beats."""
    name = next(iter(cases))
    seconds = measure({**cases, **ceiling_cases(config.device, dtype)}, config.seconds)
    limit = ceiling(seconds)
    return Record(
        name=name,
        size=size,
        batch=batch,
        device=config.device,
        dtype=str(dtype).removeprefix("torch."),
        seconds=seconds[name],
        flops=flops,
        ceiling_flops_per_s=limit,
        ratio_to_ceiling=seconds[name] * limit / flops,
        speedup_over_reference=seconds["reference"] / seconds[name] if "reference" in cases else None,
    )


def start_up(config: BenchConfig) -> Iterator[Measurement]:
    """A new process to a compiled agent's first action, the compiler's results being cached.

    The agent is a teacher, or a speculative one whose corrector is compiled too.
    """
    for size, architecture in product(config.sizes, ("", "temporal")):
        yield partial(start_up_record, size, architecture, config.device)


def start_up_record(size: int, architecture: str, device: str) -> Record:
    model, mode = random_model(size), SpeculationConfig(corrector=architecture)
    with tempfile.TemporaryDirectory() as folder:
        save_world_model(folder, model, **({"speculation": asdict(mode)} if architecture else {}))
        if architecture:
            corrector = random_corrector(model, architecture)
            save_corrector(Path(folder) / "correctors" / architecture, corrector, fingerprint(model))
        times = [seconds_to_act(folder, device) for _ in range(6)]  # the first fills the cache
    return Record(
        name="start_up_speculative" if architecture else "start_up",
        size=size,
        batch=1,
        device=device,
        dtype=resolved(COMPILED, torch.device("cpu")).precision,
        seconds=float(np.median(times[1:])),
    )


def seconds_to_act(folder: str, device: str) -> float:
    command = [sys.executable, "-c", FIRST_ACTION, folder, device, str(OBS_DIM)]
    begin = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout
        process.stdout.readline()
        seconds = time.perf_counter() - begin
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return seconds


def update(config: BenchConfig) -> Iterator[Measurement]:
    """One update of `batch_size` segments of `planner.horizon` steps, for every size and precision."""
    for size, precision in product(config.sizes, config.precisions):
        yield partial(update_record, size, ComputeConfig(precision, config.compile), config)


def update_record(size: int, compute: ComputeConfig, config: BenchConfig) -> Record:
    settings, device, b = UpdateConfig(), config.device, UpdateConfig.batch_size
    horizon = config.planner.horizon
    batch = Batch(
        torch.randn(horizon + 1, b, OBS_DIM, device=device),
        torch.rand(horizon, b, ACTION_DIM, device=device) * 2 - 1,
        torch.rand(horizon, b, device=device),
        torch.zeros(horizon, b, device=device),
    )
    ours = Update(random_model(size).to(device), settings, DISCOUNT, NoiseSource(0, device), compute)
    plain = {}
    if device == "cpu":
        reference = ReferenceUpdate(random_model(size), settings, DISCOUNT, NoiseSource(0))
        plain["reference"] = lambda: reference(batch)
    return against_limit(
        {"update": lambda: ours(batch), **plain},
        flops=update_flops(ours.model.config, horizon, b),
        dtype=ours.dtype,
        size=size,
        batch=b,
        config=config,
    )


def speculative_step(config: BenchConfig) -> Iterator[Measurement]:
    """Steps of a speculative agent that do not replan, for both correctors, at 1M."""
    for architecture in ("two_tower", "temporal"):
        yield partial(step_record, architecture, config)


def step_record(architecture: str, config: BenchConfig) -> Record:
    agent = speculative_agent(architecture, config)
    observations = torch.randn(OBSERVATIONS, OBS_DIM, device=config.device).unbind()
    for obs in observations:
        agent.act(obs)
    times: list[float] = []
    end = time.perf_counter() + config.seconds
    while time.perf_counter() < end or len(times) < TIMED:
        for obs in observations:
            begin = time.perf_counter()
            agent.act(obs)
            times.append(time.perf_counter() - begin)
    return Record(
        name=f"speculative_step_{architecture}",
        size=1,
        batch=1,
        device=config.device,
        dtype="float32",
        seconds=float(np.median(times)),
        p99_seconds=float(np.quantile(times, 0.99)),
    )


def memory(config: BenchConfig) -> Iterator[Measurement]:
    """`memory_steps` steps of a speculative agent: how the process grows after the first tenth of them."""
    yield partial(memory_record, config)


def memory_record(config: BenchConfig) -> Record:
    agent = speculative_agent("temporal", config, execution_horizon=24)
    observations = torch.randn(OBSERVATIONS, OBS_DIM, device=config.device).unbind()
    begin, after_warm_up = time.perf_counter(), 0
    for i in range(config.memory_steps):
        if i == config.memory_steps // 10:
            after_warm_up = resident()
        agent.act(observations[i % len(observations)])
    return Record(
        name="memory",
        size=1,
        batch=1,
        device=config.device,
        dtype="float32",
        seconds=(time.perf_counter() - begin) / config.memory_steps,
        resident_growth_bytes=resident() - after_warm_up,
        steps=config.memory_steps,
    )


def speculative_agent(
    architecture: str, config: BenchConfig, execution_horizon: int = NEVER_AGAIN
) -> SpeculativeAgent:
    model = random_model(1).to(config.device)
    teacher = TDMPC2(model, SMALLEST, compute=ComputeConfig(compile=config.compile))
    corrector = random_corrector(model, architecture).to(config.device)
    mode = SpeculationConfig(execution_horizon, corrector=architecture, refine_steps=1)
    agent = SpeculativeAgent(teacher, mode, corrector)
    agent.reset()
    return agent


def random_corrector(model: WorldModel, architecture: str) -> BaseCorrector:
    sizes = CorrectorConfig(model.config.latent_dim, ACTION_DIM, architecture)
    return build_corrector(sizes).eval().requires_grad_(False)


def training(config: BenchConfig) -> Iterator[Measurement]:
    """One step of training on cartpole-swingup at 1M: simulate, plan, update; seconds, without seeding."""
    for precision in config.precisions:
        yield partial(training_record, precision, config)


def training_record(precision: str, config: BenchConfig) -> Record:
    class Enough(Exception):
        pass

    times: list[float] = []

    def on_step(trainer: Trainer) -> None:
        if trainer.updates > trainer.seed_steps:
            times.append(time.perf_counter())
        if times and times[-1] - times[0] > config.seconds:
            raise Enough

    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(Enough):
        settings = TrainConfig(
            task="cartpole-swingup",
            model_size=1,
            seed_steps=20,
            planner=TrainPlannerConfig(compile=config.compile, precision=precision),
            device=config.device,
            work_dir=folder,
        )
        Trainer(settings).run(on_step=on_step)
    return Record(
        name="training",
        size=1,
        batch=UpdateConfig.batch_size,
        device=config.device,
        dtype=precision,
        seconds=float(np.median(np.diff(times))),
    )


def random_model(size: int) -> WorldModel:
    """A model of that size whose heads say something: they are zero in a new one."""
    torch.manual_seed(0)
    model = WorldModel(WorldModelConfig((OBS_DIM,), ACTION_DIM, **MODEL_SIZES[size]))  # type: ignore[arg-type]
    for last in (model.reward_head[-1], model.q[-1]):
        torch.nn.init.normal_(last.weight, std=0.02)  # type: ignore[arg-type]
    return model.eval().requires_grad_(False)


BENCHMARKS: dict[str, Callable[[BenchConfig], Iterator[Measurement]]] = {
    "planner": planner,
    "start_up": start_up,
    "update": update,
    "speculative_step": speculative_step,
    "training": training,
    "memory": memory,
}


def main(config: BenchConfig) -> None:
    unknown = set(config.only) - set(BENCHMARKS)
    if unknown:
        raise ConfigError(f"only={sorted(unknown)}: there are {', '.join(BENCHMARKS)}")
    console, about = Console(), provenance()  # of the tree as it is before there are results
    records = []
    for name, benchmark in BENCHMARKS.items():
        if config.only and name not in config.only:
            continue
        for measurement in benchmark(config):
            record = alone(measurement, config.threads)
            records.append(record)
            console.print(f"{name}: {record.size}M, batch {record.batch}, {record.dtype}")
            content = {**about, "records": [asdict(r) for r in records]}
            Path(config.out).parent.mkdir(parents=True, exist_ok=True)
            write_json(config.out, content)
    console.print(table(records))


def alone(measurement: Measurement, threads: int) -> Record:
    """`measurement` in a new process."""
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        if threads:
            process.submit(torch.set_num_threads, threads).result()
        return process.submit(measurement).result()


def resident() -> int:
    """Bytes of this process in memory, on Linux."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def table(records: list[Record]) -> Table:
    """The records, for people: `limit` is the ceiling, `faster` the speedup over the reference."""
    out = Table("name", "size", "B", "dtype", "ms", "p99", "GFLOP", "GFLOP/s", "limit", "/ limit", "faster")
    out.box, out.columns[0].no_wrap = None, True
    for r in records:
        achieved = None if r.flops is None else r.flops / r.seconds / 1e9
        limit = None if r.ceiling_flops_per_s is None else r.ceiling_flops_per_s / 1e9
        flops = None if r.flops is None else r.flops / 1e9
        p99 = None if r.p99_seconds is None else r.p99_seconds * 1e3
        numbers = (r.seconds * 1e3, p99, flops, achieved, limit, r.ratio_to_ceiling, r.speedup_over_reference)
        cells = ("" if x is None else f"{x:.{0 if x >= 100 else 2}f}" for x in numbers)
        out.add_row(r.name, f"{r.size}M", str(r.batch), r.dtype, *cells)
    return out


if __name__ == "__main__":
    cli.run(BenchConfig, main)
