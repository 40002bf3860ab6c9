"""Checkpoints that cannot be what they claim are refused in one line; all published shapes are read."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

import tdmpc2
from tdmpc2.agent import load_teacher
from tdmpc2.config import MODEL_SIZES, WorldModelConfig
from tdmpc2.errors import CheckpointError, ConfigError
from tdmpc2.world_model import WorldModel, fingerprint, load_world_model, save_world_model
from tdmpc2.world_model.checkpoint import published_task_index

OFFICIAL = Path(__file__).parent / "fixtures/official"


def refused(path: Path, *words: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        load_world_model(path)
    message = str(caught.value)
    assert "\n" not in message and str(path) in message
    assert all(word in message for word in words), message


def test_a_missing_file(tmp_path: Path) -> None:
    refused(tmp_path / "none.pt", "no checkpoint")
    refused(tmp_path, "config.json")
    with pytest.raises(ConfigError, match="device=gpu"):
        load_world_model(OFFICIAL / "state_small.pt", "gpu")


def test_a_truncated_file(tmp_path: Path) -> None:
    whole = (OFFICIAL / "state_small.pt").read_bytes()
    for share in (0.0, 0.3, 0.99):
        path = tmp_path / "cut.pt"
        path.write_bytes(whole[: int(share * len(whole))])
        refused(path)


def test_a_pickle_that_carries_code(tmp_path: Path) -> None:
    marker = tmp_path / "executed"

    class Code:
        def __reduce__(self) -> tuple:
            return os.system, (f"touch {marker}",)

    path = tmp_path / "code.pt"
    torch.save({"model": Code()}, path)
    refused(path, "code")
    assert not marker.exists()


def test_a_foreign_file(tmp_path: Path) -> None:
    path = tmp_path / "foreign.pt"
    torch.save({"layer.weight": torch.zeros(3, 3)}, path)
    refused(path, "not a TD-MPC2 checkpoint")
    torch.save([1, 2, 3], path)
    refused(path, "not a TD-MPC2 checkpoint")
    path.write_text("<html>not found</html>")
    refused(path)


@pytest.mark.parametrize("damage", ["missing", "shape"])
def test_a_checkpoint_whose_parts_do_not_fit(tmp_path: Path, damage: str) -> None:
    state = torch.load(OFFICIAL / "state_small.pt", weights_only=True)
    if damage == "missing":
        del state["model"]["_reward.1.weight"]
    else:
        state["model"]["_reward.1.weight"] = torch.zeros(7, 7)
    torch.save(state, tmp_path / "model.pt")
    refused(tmp_path / "model.pt", "reward_head.1.weight")


def test_a_damaged_folder_of_ours(tmp_path: Path) -> None:
    model = load_world_model(OFFICIAL / "state_small.pt")
    save_world_model(tmp_path / "good", model)
    assert fingerprint(load_world_model(tmp_path / "good")) == fingerprint(model)

    def copy(name: str) -> Path:
        return Path(shutil.copytree(tmp_path / "good", tmp_path / name))

    weights = copy("cut") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    refused(tmp_path / "cut", "damaged")
    (copy("garbled") / "config.json").write_text("{")
    refused(tmp_path / "garbled", "damaged")
    config = json.loads((copy("other") / "config.json").read_text())
    (tmp_path / "other/config.json").write_text(json.dumps({**config, "format": "tdmpc9"}))
    refused(tmp_path / "other", "tdmpc9")
    config["world_model"]["mlp_dim"] = 64
    (copy("wrong") / "config.json").write_text(json.dumps(config))
    refused(tmp_path / "wrong", "should have shape")


def test_both_formats_hold_the_same_teacher() -> None:
    new, old = (load_world_model(OFFICIAL / f"state_small{f}.pt") for f in ("", "_old_format"))
    assert fingerprint(new) == fingerprint(old)
    assert new.config == old.config
    new, old = (load_world_model(OFFICIAL / f"mt30_small{f}.pt") for f in ("", "_old_format"))
    assert new.config.action_dims == old.config.action_dims, "the old format does not carry the masks"


@pytest.mark.parametrize(("size", "millions"), [(1, 1), (5, 5), (19, 19), (48, 48), (317, 317)])
def test_sizes_have_the_parameters_they_promise(size: int, millions: int) -> None:
    with torch.device("meta"):
        model = WorldModel(WorldModelConfig((39,), 6, **MODEL_SIZES[size]))
    count = sum(p.numel() for name, p in model.named_parameters() if not name.startswith("target"))
    assert 0.65 < count / (1e6 * millions) < 1.35


def test_a_task_of_a_published_set_is_found_by_name() -> None:
    assert published_task_index("walker-walk", 30) == 1
    assert published_task_index("pendulum-spin", 80) == 29
    with pytest.raises(CheckpointError, match="published"):
        published_task_index("walker-walk", 12)


def test_load_agent_opens_a_plain_checkpoint() -> None:
    agent = tdmpc2.load_agent(OFFICIAL / "state_small.pt")
    assert isinstance(agent, tdmpc2.TDMPC2)
    assert agent.planner.config.num_samples == 512


def test_a_config_that_does_not_fit(tmp_path: Path) -> None:
    """Of another version, or edited: one line, whichever part it is."""
    model = load_world_model(OFFICIAL / "state_small.pt")
    for planner in ({"horizont": 3}, 5, None):
        save_world_model(tmp_path, model, planner=planner)
        with pytest.raises(CheckpointError, match="horizont" if planner == {"horizont": 3} else "mapping"):
            load_teacher(tmp_path)
    save_world_model(tmp_path, model)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["world_model"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError):
        load_world_model(tmp_path)
