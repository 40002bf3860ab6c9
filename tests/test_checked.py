"""Settings of a wrong type or out of range are refused where a config is made, from Python or from JSON."""

import json
import math
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tdmpc2.checked import from_json
from tdmpc2.config import (
    MODEL_SIZES,
    ComputeConfig,
    CorrectorConfig,
    PlannerConfig,
    SpeculationConfig,
    UpdateConfig,
    WorldModelConfig,
)
from tdmpc2.errors import ConfigError
from tdmpc2.training.trainer import TrainConfig, TrainPlannerConfig

GOOD: list[Any] = [
    WorldModelConfig((24,), 6),
    WorldModelConfig((9, 64, 64), 6),
    WorldModelConfig((24,), 6, num_tasks=2, task_dim=96, action_dims=(6, 1)),
    PlannerConfig(),
    ComputeConfig(),
    UpdateConfig(),
    SpeculationConfig(threshold=(0.1, math.inf)),
    CorrectorConfig(512, 6),
]


@pytest.mark.parametrize("config", GOOD, ids=lambda config: type(config).__name__)
def test_every_value_of_a_wrong_type_is_refused(config: Any) -> None:
    cls = type(config)
    assert from_json(cls, asdict(config)) == config
    for field in fields(cls):
        for wrong in (math.nan, {}, [[]], 10**400, [math.nan], "junk", True):
            good = {str: str, bool: bool}.get(type(getattr(config, field.name)))
            if good and isinstance(wrong, good) and field.name != "precision":
                continue
            with pytest.raises(ConfigError, match=field.name) as caught:
                from_json(cls, {**asdict(config), field.name: wrong})
            assert "\n" not in str(caught.value) and len(str(caught.value)) < 250
            if not isinstance(wrong, list):
                with pytest.raises(ConfigError, match=field.name):
                    replace(config, **{field.name: wrong})


def test_settings_that_are_no_settings() -> None:
    for settings in (None, [], "x", 5, [["horizon", 3]]):
        with pytest.raises(ConfigError, match="mapping"):
            from_json(PlannerConfig, settings)
    with pytest.raises(ConfigError, match="'horizont': there is no such setting"):
        from_json(PlannerConfig, {"horizont": 3})
    with pytest.raises(ConfigError, match="action_dim is missing"):
        from_json(WorldModelConfig, {"obs_shape": [3]})


def test_numbers_of_numpy_and_whole_numbers_for_floats_are_numbers() -> None:
    planner = PlannerConfig(horizon=np.int64(4), max_std=np.float32(1.5), temperature=1)
    assert (planner.horizon, planner.max_std, planner.temperature) == (4, 1.5, 1)


@pytest.mark.parametrize(
    ("config", "wrong"),
    [
        (GOOD[3], {"horizon": 0}),
        (GOOD[3], {"iterations": 2**31}),
        (GOOD[3], {"num_samples": 10**7}),
        (GOOD[3], {"num_elites": 513}),
        (GOOD[3], {"num_elites": 0}),
        (GOOD[3], {"num_pi_trajs": -1}),
        (GOOD[3], {"temperature": -1.0}),
        (GOOD[3], {"max_std": math.inf}),
        (GOOD[3], {"min_std": 3.0}),
        (GOOD[4], {"precision": "float64"}),
        (GOOD[5], {"lr": -1.0}),
        (GOOD[5], {"lr": 0.0}),
        (GOOD[5], {"batch_size": 0}),
        (GOOD[5], {"value_coef": -0.1}),
        (GOOD[7], {"width": 36, "num_heads": 4}),
        (GOOD[7], {"width": 4}),
        (GOOD[7], {"num_layers": 10**6}),
        (GOOD[0], {"num_bins": 1}),
        (GOOD[0], {"obs_shape": ()}),
        (GOOD[0], {"obs_shape": (9, 32, 32)}),
        (GOOD[0], {"obs_shape": (0,)}),
        (GOOD[0], {"latent_dim": 10**9}),
        (GOOD[0], {"simnorm_dim": 0}),
        (GOOD[0], {"simnorm_dim": 7}),
        (GOOD[0], {"vmin": 10.0}),
        (GOOD[0], {"vmax": 200.0}),
        (GOOD[0], {"log_std_max": -10.0}),
        (GOOD[0], {"num_enc_layers": 10**9}),
        (GOOD[0], {"dropout": 1.0}),
        (GOOD[0], {"task_dim": 9600}),
        (GOOD[2], {"action_dims": (6,)}),
        (GOOD[2], {"action_dims": (6, 7)}),
        (GOOD[2], {"num_tasks": 10**6}),
    ],
)
def test_values_out_of_range_are_named(config: Any, wrong: dict[str, Any]) -> None:
    name = next(iter(wrong))
    with pytest.raises(ConfigError, match="num_tasks|action_dims" if "_dims" in name else name):
        replace(config, **wrong)


def test_errors_of_parts_name_the_setting_as_it_is_typed(tmp_path: Path) -> None:
    config = TrainConfig(task="x", work_dir=tmp_path, planner=TrainPlannerConfig(horizon=5))
    assert from_json(TrainConfig, asdict(config)) == config
    for wrong, message in {
        '{"planner": {"horizon": 0}}': "^planner.horizon=0: must be from 1 to 100",
        '{"planner": {"precision": "float16"}}': "^planner.precision=float16: must be one of",
        '{"planner": {"horizont": 3}}': "^planner.'horizont': there is no such setting",
        '{"planner": 3}': "^planner=3: must be of type TrainPlannerConfig",
        '{"planner": [3]}': r"^planner=\(3,\): must be of type TrainPlannerConfig",
        '{"update": {"lr": "x"}}': "^update.lr='x': must be of type float",
        '{"evaluation": {"freq": null}}': "^evaluation.freq=None: must be of type int",
        '{"steps": 0}': "^steps=0: must be at least 1",
        '{"seed_steps": "5"}': "^seed_steps='5': must be of type",
    }.items():
        with pytest.raises(ConfigError, match=message):
            from_json(TrainConfig, {"task": "x", **json.loads(wrong)})


def test_the_published_sizes_are_in_range() -> None:
    for widths in MODEL_SIZES.values():
        WorldModelConfig((1000,), 61, num_tasks=80, task_dim=96, action_dims=(61,) * 80, **widths)
