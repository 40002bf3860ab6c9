"""The benchmarks: the formula for required operations is what is really computed, and records are whole."""

import json
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tdmpc2.config import PlannerConfig, WorldModelConfig
from tdmpc2.errors import ConfigError
from tdmpc2.planner import NoiseSource, Planner
from tdmpc2.world_model import WorldModel

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import bench
from flops import plan_flops
from measure import Record, measure

BUDGET = PlannerConfig(horizon=3, iterations=2, num_samples=32, num_elites=8, num_pi_trajs=4)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("episodic", [False, True])
def test_required_operations_are_those_of_the_planner(batch: int, episodic: bool) -> None:
    config = WorldModelConfig((7,), 3, mlp_dim=24, latent_dim=32, num_q=5, num_bins=21, episodic=episodic)
    model = WorldModel(config).eval().requires_grad_(False)
    z = model.encode(torch.randn(batch, 7))
    planner = Planner(model, BUDGET, 0.99, NoiseSource(0))
    with FlopCounterMode(display=False) as counter:
        planner.plan(z)
    assert counter.get_total_flops() == plan_flops(config, BUDGET, batch)


def test_measuring_tells_fast_from_slow() -> None:
    x = torch.rand(200, 200)
    seconds = measure({"slow": lambda: [x @ x for _ in range(50)], "fast": lambda: x @ x}, 0.2)
    assert 0 < seconds["fast"] < seconds["slow"]


def test_bench_writes_records(tmp_path: Path, capsys) -> None:
    settings = {name: getattr(BUDGET, name) for name in vars(BUDGET)}
    out = tmp_path / "new" / "bench.json"
    config = bench.BenchConfig(
        **settings,
        only=("planner",),
        sizes=(1,),
        batches=(1, 2),
        precisions=("float32",),
        compile=False,
        seconds=0.01,
        out=str(out),
    )
    bench.main(config)
    written = json.loads(out.read_text())
    assert written["machine"] and written["commit"]
    records = [Record(**r) for r in written["records"]]
    assert [(r.size, r.batch, r.dtype) for r in records] == [(1, 1, "float32"), (1, 2, "float32")]
    for r in records:
        assert r.flops and r.ceiling_flops_per_s and r.ratio_to_ceiling and r.speedup_over_reference
        expected = r.seconds * r.ceiling_flops_per_s / r.flops
        assert r.ratio_to_ceiling == pytest.approx(expected)
    assert "planner: 1M, batch 2, float32" in capsys.readouterr().out


def test_unknown_benchmark_is_refused() -> None:
    with pytest.raises(ConfigError, match="planner"):
        bench.main(bench.BenchConfig(only=("plannr",)))
