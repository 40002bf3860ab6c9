"""Measure how fast this machine plans, and how far that is from its limit.

    python benchmarks/bench.py                                 everything, into results/bench.json
    python benchmarks/bench.py only=[planner] sizes=[5] batches=[1]

Each benchmark is a function of the settings that yields records (see measure.py).
"""

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from flops import plan_flops
from measure import Record, ceiling, ceiling_cases, measure
from reference import reference_plan
from rich.console import Console
from rich.table import Table

from tdmpc2 import cli
from tdmpc2.config import MODEL_SIZES, ComputeConfig, PlannerConfig, WorldModelConfig
from tdmpc2.errors import ConfigError
from tdmpc2.files import write_json
from tdmpc2.inference import fastest
from tdmpc2.planner import NoiseSource, Planner
from tdmpc2.world_model import WorldModel, save_world_model

OBS_DIM, ACTION_DIM, DISCOUNT = 24, 6, 0.99  # those of walker-walk
FIRST_ACTION = """
import sys, torch, tdmpc2
from tdmpc2.config import PlannerConfig
from tdmpc2.inference import fastest
model = tdmpc2.load_world_model(sys.argv[1], sys.argv[2])
agent = tdmpc2.TDMPC2(model, PlannerConfig(), compute=fastest(sys.argv[2]))
agent.act(torch.zeros(model.config.obs_shape))
"""


@dataclass(frozen=True, kw_only=True)
class BenchConfig(PlannerConfig):
    """What is measured, and where the results go."""

    only: tuple[str, ...] = ()  # names of benchmarks; none: all
    sizes: tuple[int, ...] = (1, 5, 19)  # millions of parameters
    batches: tuple[int, ...] = (1, 16)  # latents planned from at once
    precisions: tuple[str, ...] = ()  # float32, bfloat16; none: the device's fastest, and float32
    compile: bool = True
    device: str = "cpu"
    threads: int = 0  # of PyTorch on a CPU; 0: its own choice
    seconds: float = 30.0  # of measuring, for each record
    out: str = "results/bench.json"


def planner(config: BenchConfig) -> Iterator[Record]:
    """One plan, for every size, precision and batch."""
    precisions = config.precisions or sorted({fastest(config.device).precision, "float32"})
    for size in config.sizes:
        model = random_model(size).to(config.device)
        for precision in precisions:
            torch._dynamo.reset()  # PyTorch compiles a function for a limited number of models only
            compute = ComputeConfig(precision, config.compile)
            ours = Planner(model, config, DISCOUNT, NoiseSource(0, config.device), compute)
            for batch in config.batches:
                yield plan_record(ours, size, batch, config)


def plan_record(ours: Planner, size: int, batch: int, config: BenchConfig) -> Record:
    z = ours.model.encode(torch.randn(batch, OBS_DIM, device=config.device))
    noise = ours.noise
    plain = {}
    if config.device == "cpu":
        plain["reference"] = lambda: reference_plan(ours.model, config, DISCOUNT, noise, z[0])
    dtype = ours.fast.dtype
    seconds = measure(
        {"plan": lambda: ours.plan(z), **plain, **ceiling_cases(config.device, dtype)}, config.seconds
    )
    flops, limit = plan_flops(ours.model.config, config, batch), ceiling(seconds)
    return Record(
        name="plan",
        size=size,
        batch=batch,
        device=config.device,
        dtype=ours.compute.precision,
        seconds=seconds["plan"],
        flops=flops,
        ceiling_flops_per_s=limit,
        ratio_to_ceiling=seconds["plan"] * limit / flops,
        # The reference plans from one latent at a time.
        speedup_over_reference=batch * seconds["reference"] / seconds["plan"] if plain else None,
    )


def start_up(config: BenchConfig) -> Iterator[Record]:
    """A new process to a compiled agent's first action, the compiler's results being cached."""
    for size in config.sizes:
        with tempfile.TemporaryDirectory() as folder:
            save_world_model(folder, random_model(size))
            command = [sys.executable, "-c", FIRST_ACTION, folder, config.device]
            times = []
            for _ in range(4):  # the first fills the cache
                begin = time.perf_counter()
                subprocess.run(command, check=True)
                times.append(time.perf_counter() - begin)
        yield Record(
            name="start_up",
            size=size,
            batch=1,
            device=config.device,
            dtype=fastest(config.device).precision,
            seconds=min(times[1:]),
        )


def random_model(size: int) -> WorldModel:
    """A model of that size whose heads say something: they are zero in a new one."""
    torch.manual_seed(0)
    model = WorldModel(WorldModelConfig((OBS_DIM,), ACTION_DIM, **MODEL_SIZES[size]))  # type: ignore[arg-type]
    for last in (model.reward_head[-1], model.q[-1]):
        torch.nn.init.normal_(last.weight, std=0.02)  # type: ignore[arg-type]
    return model.eval().requires_grad_(False)


BENCHMARKS: dict[str, Callable[[BenchConfig], Iterator[Record]]] = {
    "planner": planner,
    "start_up": start_up,
}


def main(config: BenchConfig) -> None:
    unknown = set(config.only) - set(BENCHMARKS)
    if unknown:
        raise ConfigError(f"only={sorted(unknown)}: there are {', '.join(BENCHMARKS)}")
    if config.threads:
        torch.set_num_threads(config.threads)
    console = Console()
    records = []
    for name, benchmark in BENCHMARKS.items():
        if config.only and name not in config.only:
            continue
        for record in benchmark(config):
            records.append(record)
            console.print(f"{name}: {record.size}M, batch {record.batch}, {record.dtype}")
            content = {**cli.provenance(), "records": [asdict(r) for r in records]}
            Path(config.out).parent.mkdir(parents=True, exist_ok=True)
            write_json(config.out, content)
    console.print(table(records))


def table(records: list[Record]) -> Table:
    """The records, for people: `limit` is the ceiling, `faster` the speedup over the reference."""
    out = Table("name", "size", "B", "dtype", "ms", "GFLOP", "GFLOP/s", "limit", "/ limit", "faster")
    for r in records:
        achieved = None if r.flops is None else r.flops / r.seconds / 1e9
        limit = None if r.ceiling_flops_per_s is None else r.ceiling_flops_per_s / 1e9
        flops = None if r.flops is None else r.flops / 1e9
        numbers = (r.seconds * 1e3, flops, achieved, limit, r.ratio_to_ceiling, r.speedup_over_reference)
        cells = ("" if x is None else f"{x:.{0 if x >= 100 else 2}f}" for x in numbers)
        out.add_row(r.name, f"{r.size}M", str(r.batch), r.dtype, *cells)
    return out


if __name__ == "__main__":
    cli.run(BenchConfig, main)
