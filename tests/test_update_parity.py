"""One gradient update against the original implementation's own numbers."""

from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tdmpc2.config import COMPILED, EAGER, ComputeConfig, UpdateConfig
from tdmpc2.errors import ConfigError
from tdmpc2.training.update import INFO, Batch, Update, random_shift
from tdmpc2.world_model.checkpoint import load_world_model, our_name, save_world_model
from tdmpc2.world_model.model import WorldModel

OFFICIAL = Path(__file__).parent / "fixtures" / "official"


class Quiet:
    """No policy noise, and always the first two Q heads, as when the numbers were recorded."""

    def normal(self, *shape: int) -> Tensor:
        return torch.zeros(*shape)

    def two_heads(self, num_q: int) -> Tensor:
        return torch.tensor([0, 1])


def recorded(name: str) -> dict[str, np.ndarray]:
    with np.load(OFFICIAL / f"{name}_update.npz") as data:
        return {key: data[key] for key in data.files}


def batch_of(x: dict[str, np.ndarray]) -> Batch:
    obs, action, reward, terminated = (
        torch.from_numpy(x[key]) for key in ("obs", "action", "reward", "terminated")
    )
    return Batch(obs, action, reward.squeeze(-1), terminated.squeeze(-1))


@pytest.mark.parametrize("form", ["original", "ours"])
@pytest.mark.parametrize("name", ["state_small", "state_small_old_format", "episodic_small"])
def test_update(name: str, form: str, tmp_path: Path) -> None:
    model = load_world_model(OFFICIAL / f"{name}.pt")
    if form == "ours":
        save_world_model(tmp_path, model)
        model = load_world_model(tmp_path)
    check_update(name, model, EAGER)


def test_compiled_update() -> None:
    """Of an episodic model, which has all that others have."""
    check_update("episodic_small", load_world_model(OFFICIAL / "episodic_small.pt"), COMPILED)


def test_update_in_bfloat16() -> None:
    """Close to float32's losses, not equal; weights and latents stay float32; other names are refused."""
    x, model = recorded("state_small"), load_world_model(OFFICIAL / "state_small.pt")
    update = Update(model, UpdateConfig(), 0.99, Quiet(), ComputeConfig("bfloat16"))
    info = update(batch_of(x), dropout=False)
    ratios = {key: info[key].item() / x[f"info/{key}"] for key in ("total_loss", "grad_norm", "pi_loss")}
    assert all(ratio == pytest.approx(1, rel=0.02) for ratio in ratios.values())
    assert any(ratio != pytest.approx(1, rel=1e-5) for ratio in ratios.values())
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    with pytest.raises(ConfigError, match="float32"):
        Update(model, UpdateConfig(), 0.99, Quiet(), ComputeConfig("float16"))


def check_update(name: str, model: WorldModel, compute: ComputeConfig) -> None:
    x, before = recorded(name.removesuffix("_old_format")), deepcopy(model.state_dict())
    update = Update(model, UpdateConfig(), 0.99, Quiet(), compute)
    info = update(batch_of(x), dropout=False)

    # What the original logs of the termination head besides its loss is not part of the update.
    recorded_info = {key.removeprefix("info/") for key in x if key.startswith("info/")}
    assert set(INFO) == recorded_info - {"termination_rate", "termination_f1"}
    assert tuple(info) == INFO
    for key in INFO:
        np.testing.assert_allclose(info[key].item(), x[f"info/{key}"], rtol=1e-4, err_msg=key)
    np.testing.assert_allclose(update.q_scale.item(), x["scale"], rtol=1e-4)

    checked = set()
    for key in x:
        if key.startswith("delta_norm/"):
            original = key.removeprefix("delta_norm/")
            ours = our_name(original)
            assert ours is not None, original
            after = model.state_dict()[ours]
            delta = (after - before[ours]).double().norm().item()
            np.testing.assert_allclose(delta, x[key], rtol=1e-2, err_msg=key)
            norm = after.double().norm().item()
            np.testing.assert_allclose(norm, x[f"after_norm/{original}"], rtol=1e-5, err_msg=key)
            checked.add(ours)
    assert checked == set(before), "a parameter was left out"


def test_dropout() -> None:
    """It acts on the Q heads in training alone, and the model is left in evaluation mode."""
    x, model = recorded("state_small"), load_world_model(OFFICIAL / "state_small.pt")
    twin = deepcopy(model)
    torch.manual_seed(0)
    with_dropout = Update(model, UpdateConfig(), 0.99, Quiet())(batch_of(x))
    without = Update(twin, UpdateConfig(), 0.99, Quiet())(batch_of(x), dropout=False)
    assert not model.training and not model.target_q.training
    for key in ("consistency_loss", "reward_loss"):
        assert with_dropout[key] == without[key]
    assert with_dropout["value_loss"] != without["value_loss"]
    assert all(p.grad is None for p in model.target_q.parameters())


def test_random_shift_moves_whole_images() -> None:
    torch.manual_seed(0)
    images = torch.randint(0, 256, (2, 5, 9, 16, 16), dtype=torch.uint8)
    moved = random_shift(images)
    assert moved.shape == images.shape and moved.dtype == torch.uint8
    padded = torch.nn.functional.pad(images.flatten(0, 1).float(), (3, 3, 3, 3), mode="replicate")
    found = []
    for pad, image in zip(padded, moved.flatten(0, 1).float(), strict=True):
        crops = {(dy, dx): pad[:, dy : dy + 16, dx : dx + 16] for dy in range(7) for dx in range(7)}
        found.append([at for at, crop in crops.items() if torch.equal(crop, image)])
    assert all(len(at) == 1 for at in found)
    assert len({at[0] for at in found}) > 3, "every image moved alike"
