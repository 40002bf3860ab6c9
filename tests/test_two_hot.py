"""Discrete regression: what goes in comes out, and the worked example of the module holds."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from tdmpc2.config import WorldModelConfig
from tdmpc2.world_model import soft_cross_entropy, symexp, symlog, two_hot, two_hot_inv

CONFIG = WorldModelConfig((1,), 1)


@given(st.floats(-2e4, 2e4))
def test_two_hot_and_back(value: float) -> None:
    x = torch.tensor([value], dtype=torch.float64)
    p = two_hot(x, CONFIG)
    torch.testing.assert_close(p.sum(-1), torch.ones(1, dtype=torch.float64))
    assert (p > 0).sum() <= 2
    torch.testing.assert_close(two_hot_inv(p.log(), CONFIG), x, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(symexp(symlog(x)), x, rtol=1e-9, atol=1e-9)


def test_values_beyond_the_support_are_clamped() -> None:
    p = two_hot(torch.tensor([1e9, -1e9]), CONFIG)
    assert p[0, -1] == 1 and p[1, 0] == 1


def test_worked_example() -> None:
    small = WorldModelConfig((1,), 1, num_bins=3, vmin=-1.0, vmax=1.0)
    x = symexp(torch.tensor([0.25]))
    torch.testing.assert_close(two_hot(x, small), torch.tensor([[0.0, 0.75, 0.25]]))


def test_cross_entropy_is_least_at_the_target() -> None:
    target = torch.tensor([3.0])
    right = two_hot(target, CONFIG).clamp(min=1e-9).log()
    wrong = two_hot(torch.tensor([4.0]), CONFIG).clamp(min=1e-9).log()
    assert soft_cross_entropy(right, target, CONFIG) < soft_cross_entropy(wrong, target, CONFIG)
