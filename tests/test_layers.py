"""The bricks: what dropout draws, and Mish as the compiler gets it."""

import pytest
import torch
import torch.nn.functional as F

from tdmpc2.world_model.layers import Linear, Mish, NormedLinear, dropout_mask, mish


@pytest.mark.parametrize("p", [0.01, 0.3])
def test_dropout_mask(p: float) -> None:
    """Every entry is dropped with probability p, whatever its neighbours and wherever it stands."""
    torch.manual_seed(0)
    masks = torch.stack([dropout_mask(torch.empty(2, 3, 50), p) for _ in range(2000)])
    dropped = (masks == 0).float()
    torch.testing.assert_close(masks.unique(), torch.tensor([0.0, 1 / (1 - p)]))
    n = dropped.numel()
    assert dropped.mean().item() == pytest.approx(p, abs=5 * (p * (1 - p) / n) ** 0.5)
    by_position = dropped.mean(0)  # 300 positions, 2000 draws of each
    assert (by_position - p).abs().max() < 5 * (p * (1 - p) / 2000) ** 0.5
    flat = dropped.flatten(1)
    both = (flat[:, 1:] * flat[:, :-1]).mean().item()
    assert both == pytest.approx(p * p, abs=5 * p / n**0.5)


def test_dropout_follows_the_seed() -> None:
    layer = NormedLinear(8, 16, Mish(), dropout=0.5).train()
    x = torch.randn(4, 8)
    torch.manual_seed(1)
    a = layer(x)
    torch.manual_seed(1)
    assert torch.equal(layer(x), a)
    assert not torch.equal(layer(x), a)
    layer(x).sum().backward()
    assert layer.weight.grad is not None and layer.weight.grad.isfinite().all()


def test_mish_as_compiled(monkeypatch) -> None:
    """The formula that the compiler gets, value and gradient, also far out."""
    x = torch.cat([torch.linspace(-30, 30, 601), torch.tensor([-1e4, -100.0, 100.0, 1e4])])
    ours, theirs = (x.clone().requires_grad_() for _ in range(2))
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    mish(ours).sum().backward()
    F.mish(theirs).sum().backward()
    torch.testing.assert_close(mish(x), F.mish(x), rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=2e-6)


def test_autocast_rounds_hidden_layers_only() -> None:
    torch.manual_seed(0)
    hidden, last, x = NormedLinear(64, 64, Mish()), Linear(64, 5), torch.randn(10, 64)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        rounded, y = hidden(x), last(x)
    assert rounded.dtype == y.dtype == torch.float32
    assert torch.equal(y, last(x))
    assert 1e-4 < (rounded - hidden(x)).abs().max() < 0.1
