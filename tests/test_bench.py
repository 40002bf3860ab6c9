"""The benchmarks: the formula for required operations is what is really computed, and records are whole."""

import json
import os
import sys
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tdmpc2.config import PlannerConfig, UpdateConfig, WorldModelConfig
from tdmpc2.errors import ConfigError
from tdmpc2.planner import NoiseSource, Planner
from tdmpc2.training.update import Batch, Update
from tdmpc2.world_model import WorldModel

sys.path.append(str(Path(__file__).parents[1] / "research"))

import bench
from flops import plan_flops, update_flops
from measure import Record, measure
from reference import ReferenceUpdate, head

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


@pytest.mark.parametrize("num_q", [2, 5])
@pytest.mark.parametrize("episodic", [False, True])
def test_required_operations_are_those_of_the_update(num_q: int, episodic: bool) -> None:
    config = WorldModelConfig(
        (7,), 3, enc_dim=20, mlp_dim=24, latent_dim=32, num_q=num_q, num_bins=21, episodic=episodic
    )
    update = Update(WorldModel(config), UpdateConfig(), 0.99, NoiseSource(0))
    with FlopCounterMode(display=False) as counter:
        update(random_batch(7, 3))
    assert counter.get_total_flops() == update_flops(config, horizon=3, batch=16)


def random_batch(obs_dim: int, action_dim: int) -> Batch:
    torch.manual_seed(0)
    b = 16
    return Batch(
        torch.randn(4, b, obs_dim), torch.rand(3, b, action_dim) * 2 - 1, torch.rand(3, b), torch.zeros(3, b)
    )


def test_reference_update_is_the_update() -> None:
    """The same losses, and the same weights after three steps, from the same noise."""
    torch.manual_seed(1)
    config = WorldModelConfig((7,), 3, enc_dim=20, mlp_dim=24, latent_dim=32, num_q=5, num_bins=21)
    model = WorldModel(config)
    for last in (model.reward_head[-1], model.q[-1]):
        torch.nn.init.normal_(last.weight, std=0.2)
    model.target_q.load_state_dict(model.q.state_dict())
    twin = deepcopy(model)
    ours = Update(model, UpdateConfig(), 0.99, NoiseSource(0))
    plain = ReferenceUpdate(twin, UpdateConfig(), 0.99, NoiseSource(0))
    for _ in range(3):
        batch = random_batch(7, 3)
        info, expected = ours(batch, dropout=False), plain(batch, dropout=False)
        for name, value in expected.items():
            torch.testing.assert_close(info[name], value, rtol=1e-4, atol=1e-6, msg=name)
    for name in ("encoder", "dynamics", "reward_head", "policy"):
        for a, b in zip(getattr(model, name).parameters(), getattr(twin, name).parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=name)
    for mine, theirs in ((model.q, plain.q), (model.target_q, plain.target_q)):
        for i in range(config.num_q):
            for a, b in zip(head(mine, i).parameters(), theirs[i].parameters(), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_other_benchmarks_measure_something(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each once, as short as can be; memory with steps enough to tell a leak."""
    monkeypatch.setattr(bench, "OBSERVATIONS", 50)
    monkeypatch.setattr(bench, "TIMED", 100)
    config = bench.BenchConfig(
        sizes=(1,), precisions=("float32",), compile=False, seconds=0.01, memory_steps=1000
    )
    (update,) = (measurement() for measurement in bench.update(config))
    assert update.flops and update.ratio_to_ceiling and update.speedup_over_reference
    steps = [measurement() for measurement in bench.speculative_step(config)]
    assert [s.name for s in steps] == ["speculative_step_two_tower", "speculative_step_temporal"]
    assert all(s.p99_seconds and s.p99_seconds > s.seconds > 0 for s in steps)
    (memory,) = (measurement() for measurement in bench.memory(config))
    # What it keeps of one step alone, a latent and a history, is some kilobytes: 900 steps would show.
    assert memory.resident_growth_bytes is not None and memory.resident_growth_bytes < 2_000_000


def test_measuring_tells_fast_from_slow() -> None:
    x = torch.rand(200, 200)
    seconds = measure({"slow": lambda: [x @ x for _ in range(50)], "fast": lambda: x @ x}, 0.2)
    assert 0 < seconds["fast"] < seconds["slow"]


def test_each_measurement_has_a_process_of_its_own() -> None:
    assert bench.alone(os.getpid, threads=1) != os.getpid()


def test_bench_writes_records(tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    alone: list[int] = []  # threads of each measurement
    monkeypatch.setattr(bench, "alone", lambda measurement, threads: alone.append(threads) or measurement())
    out = tmp_path / "new" / "bench.json"
    config = bench.BenchConfig(
        planner=BUDGET,
        only=("planner",),
        sizes=(1,),
        batches=(1, 2),
        precisions=("float32",),
        compile=False,
        seconds=0.01,
        threads=2,
        out=str(out),
    )
    bench.main(config)
    written = json.loads(out.read_text())
    assert written["machine"] and written["commit"]
    records = [Record(**r) for r in written["records"]]
    assert [(r.size, r.batch, r.dtype) for r in records] == [(1, 1, "float32"), (1, 2, "float32")]
    assert alone == [2, 2]
    for r in records:
        assert r.flops and r.ceiling_flops_per_s and r.ratio_to_ceiling and r.speedup_over_reference
        expected = r.seconds * r.ceiling_flops_per_s / r.flops
        assert r.ratio_to_ceiling == pytest.approx(expected)
    assert "planner: 1M, batch 2, float32" in capsys.readouterr().out


def test_unknown_benchmark_is_refused() -> None:
    with pytest.raises(ConfigError, match="planner"):
        bench.main(bench.BenchConfig(only=("plannr",)))
