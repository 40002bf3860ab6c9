"""The original implementation's own numbers, reproduced in float32 (see fixtures/official/README.md)."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tdmpc2.config import PlannerConfig
from tdmpc2.planner import Planner, warm_start
from tdmpc2.world_model import two_hot_inv
from tdmpc2.world_model.checkpoint import load_world_model, save_world_model

OFFICIAL = Path(__file__).parent / "fixtures" / "official"
CHECKPOINTS = [
    "state_small",
    "state_small_old_format",
    "episodic_small",
    "rgb_small",
    "mt30_small",
    "mt30_small_old_format",
]
FORMATS = ["original", "ours"]


def load(name: str, form: str, tmp_path: Path):
    model = load_world_model(OFFICIAL / f"{name}.pt")
    if form == "original":
        return model
    save_world_model(tmp_path / "folder", model)
    return load_world_model(tmp_path / "folder")


def arrays(name: str, kind: str) -> dict[str, Tensor]:
    with np.load(OFFICIAL / f"{name.removesuffix('_old_format')}_{kind}.npz") as data:
        return {key: torch.from_numpy(data[key]) for key in data.files}


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_forward(name: str, form: str, tmp_path: Path) -> None:
    model, x = load(name, form, tmp_path), arrays(name, "forward")
    task = x.get("task")
    config = model.config
    z, action = model.encode(x["obs"], task), x["action"]
    pi = model.pi(x["z"], task, x["pi_eps"])
    q_logits = model.value_logits(x["z"], action, task)
    target_q_logits = model.value_logits(x["z"], action, task, target=True)
    ours = {
        "z": z,
        "next_z": model.next(x["z"], action, task),
        "reward_logits": model.reward_logits(x["z"], action, task),
        "reward": model.reward(x["z"], action, task)[..., None],
        "q_logits": q_logits,
        "q": two_hot_inv(q_logits, config)[..., None],
        "target_q_logits": target_q_logits,
        "target_q": model.value(x["z"], action, task, target=True)[..., None],
        "pi_mean": pi.mean,
        "pi_log_std": pi.log_std,
        "pi_action": pi.action,
        "pi_entropy": pi.entropy[..., None],
        "pi_scaled_entropy": pi.scaled_entropy[..., None],
    }
    if "termination" in x:
        ours["termination"] = model.termination(x["next_z"], task)[..., None]
    assert set(ours) == set(x) - {"obs", "action", "task", "pi_eps"}, "an array was left out"
    for key, value in ours.items():
        torch.testing.assert_close(value, x[key], atol=1e-5, rtol=1e-4, msg=lambda m, k=key: k + m)


class RecordedNoise:
    """Hands a planner the noise that was recorded, in the order in which it asks."""

    def __init__(self, x: dict[str, Tensor]):
        pairs = zip(x["sample_eps"], x["value_pi_eps"], strict=True)
        self.normals = [x["pi_eps"], *(n for pair in pairs for n in pair)]
        self.gumbels, self.heads = [x["gumbel"]], list(x["q_pair"])

    def normal(self, *shape: int) -> Tensor:
        return self.normals.pop(0).reshape(shape)

    def gumbel(self, *shape: int) -> Tensor:
        return self.gumbels.pop(0).reshape(shape)

    def two_heads(self, num_q: int) -> Tensor:
        return self.heads.pop(0)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(
    ("name", "kind"),
    [(n, "plan_cold") for n in CHECKPOINTS if n != "rgb_small"]
    + [("state_small", "plan_warm"), ("state_small_old_format", "plan_warm")],
)
def test_plan(name: str, kind: str, form: str, tmp_path: Path, monkeypatch) -> None:
    model, x = load(name, form, tmp_path), arrays(name, kind)
    task = torch.tensor([4]) if name.startswith("mt30") else None
    planner = Planner(model, PlannerConfig(), discount=0.99, noise=RecordedNoise(x))
    values = []
    fast = planner.iteration.fast
    estimate = fast.score

    def recording(*args):
        values.append(estimate(*args))
        return values[-1]

    monkeypatch.setattr(fast, "score", recording)
    start = None
    if kind == "plan_warm":
        # The recorded `prev_mean` was overwritten in place by the plan's own result; what the plan
        # really started from is the mean of the cold plan, which was made just before.
        assert torch.equal(x["prev_mean"], x["mean"])
        start = warm_start(arrays(name, "plan_cold")["mean"][None], torch.tensor([1]))
    z = model.encode(x["obs"][None], task)
    plan = planner.plan(z, start, task=task)
    torch.testing.assert_close(torch.stack(values)[:, 0, :, None], x["values"], atol=1e-4, rtol=1e-3)
    # The elites' weights, from which mean and action are made.
    c, elite = planner.config, values[-1][0].topk(planner.config.num_elites).values
    score = torch.softmax(c.temperature * elite, 0)
    torch.testing.assert_close(score, x["score"], atol=1e-5, rtol=1e-3)
    torch.testing.assert_close(plan.mean[0], x["mean"], atol=1e-3, rtol=0)
    torch.testing.assert_close(plan.actions[0, 0], x["action"], atol=1e-3, rtol=0)
    assert not planner.noise.normals and not planner.noise.heads, "noise was left over"
