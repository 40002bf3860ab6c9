"""Correctors: what they do untrained, what they may see, and their files."""

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from tdmpc2.config import CorrectorConfig
from tdmpc2.corrector import (
    FILE,
    FORMAT,
    BaseCorrector,
    History,
    build_corrector,
    load_corrector,
    read_header,
    save_corrector,
)
from tdmpc2.errors import CheckpointError, ConfigError, FileError
from tdmpc2.files import read_tensors, write_tensors

BOTH = pytest.mark.parametrize("architecture", ["two_tower", "temporal"])


def make(architecture: str, trained: bool = True) -> BaseCorrector:
    """A small corrector; `trained` gives its last layer weights."""
    torch.manual_seed(0)
    config = CorrectorConfig(16, 3, architecture, width=32, window=4, num_heads=2, max_k=8)
    corrector = build_corrector(config).eval()
    if trained:
        torch.nn.init.normal_(corrector.gate.weight, std=0.5)
        torch.nn.init.normal_(corrector.own.weight, std=0.5)
    return corrector


class Steps(NamedTuple):
    """The last steps of some episodes, before a corrector embeds them."""

    z: Tensor  # [B, W, L]
    z_pred: Tensor  # [B, W, L]
    planned: Tensor  # [B, W, A]
    k: Tensor  # [B, W]
    valid: Tensor  # [B, W]


def act(corrector: BaseCorrector, x: Steps) -> Tensor:
    return corrector(History(corrector.embed(*x[:4]), x.valid), x.planned[:, -1])


def random_input(batch: int = 5, window: int = 4) -> Steps:
    generator = torch.Generator().manual_seed(1)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    valid = torch.ones(batch, window, dtype=torch.bool)
    k = torch.arange(window).expand(batch, -1)
    latents = uniform(2, batch, window, 16)
    return Steps(latents[0], latents[1], uniform(batch, window, 3) * 2 - 1, k, valid)


@BOTH
def test_untrained_corrector_executes_the_plan(architecture: str) -> None:
    corrector, x = make(architecture, trained=False), random_input()
    assert torch.equal(act(corrector, x), x.planned[:, -1])
    assert torch.equal(act(corrector.train(), x), x.planned[:, -1])


@BOTH
def test_action_stays_in_the_box_and_every_input_counts(architecture: str) -> None:
    corrector, x = make(architecture), random_input()
    action = act(corrector, x)
    assert action.shape == (5, 3)
    assert (action.abs() <= 1).all() and (action.abs() == 1).any() and (action.abs() < 1).any()
    for changed in (
        x._replace(z=x.z + 0.5),
        x._replace(z_pred=x.z_pred * 0.5),
        x._replace(planned=x.planned * 0.9),
        x._replace(k=x.k + 1),
    ):
        assert not torch.allclose(act(corrector, changed), act(corrector, x))


@BOTH
def test_clamp_lets_gradients_pull_a_saturated_action_back(architecture: str) -> None:
    corrector, x = make(architecture).train(), random_input()
    x.planned[:] = 1.0
    corrector.own.weight.data.zero_()
    corrector.own.bias.data.fill_(2.0)
    corrector.gate.bias.data.fill_(100.0)
    action = act(corrector, x)
    torch.testing.assert_close(action, torch.ones_like(action))
    bias = corrector.own.bias
    (right,) = torch.autograd.grad((action - 1.0).square().sum(), bias, retain_graph=True)
    (wrong,) = torch.autograd.grad((action - 0.5).square().sum(), bias)
    assert right.abs().max() < 1e-5
    assert (wrong > 0.1).all()


@BOTH
@pytest.mark.parametrize(("gate", "weight"), [(0.0, 0.0), (100.0, 1.0), (0.5493, 0.5)])
def test_gate_weighs_the_plan_against_an_action_of_its_own(
    architecture: str, gate: float, weight: float
) -> None:
    corrector, x = make(architecture), random_input()
    corrector.gate.weight.data.zero_()
    corrector.gate.bias.data.fill_(gate)
    own = corrector.own(corrector.features(History(corrector.embed(*x[:4]), x.valid)))
    expected = ((1 - weight) * x.planned[:, -1] + weight * own).clamp(-1, 1)
    torch.testing.assert_close(act(corrector, x), expected, atol=1e-4, rtol=0.0)


def test_masked_history_has_no_influence_and_valid_history_has() -> None:
    corrector, x = make("temporal"), random_input()
    x.valid[:, :2] = False
    rubbish = random_input()
    rubbish = rubbish._replace(k=rubbish.k + 3, valid=x.valid)
    for mine, other in zip(x[:3], rubbish[:3], strict=True):
        other[:, :2] = 37.0
        other[:, 2:] = mine[:, 2:]
    rubbish.k[:, 2:] = x.k[:, 2:]
    torch.testing.assert_close(act(corrector, rubbish), act(corrector, x))
    x.valid[:, 1] = True
    other_history = x._replace(z=x.z.clone())
    other_history.z[:, 1] = 0.0
    assert not torch.allclose(act(corrector, other_history), act(corrector, x))


@BOTH
def test_steps_beyond_the_last_embedding_take_it(architecture: str) -> None:
    corrector, x = make(architecture), random_input()
    at_last = act(corrector, x._replace(k=torch.full_like(x.k, 7)))
    torch.testing.assert_close(act(corrector, x._replace(k=torch.full_like(x.k, 500))), at_last)


@BOTH
def test_file_round_trip(architecture: str, tmp_path: Path) -> None:
    corrector, x = make(architecture), random_input()
    save_corrector(tmp_path / "c", corrector, "teacher-a", note={"validation": [0.1]})
    loaded = load_corrector(tmp_path / "c", "teacher-a")
    assert loaded.config == corrector.config and not loaded.training
    torch.testing.assert_close(act(loaded, x), act(corrector, x))
    assert read_header(tmp_path / "c")["note"] == {"validation": [0.1]}
    assert [p.name for p in (tmp_path / "c").iterdir()] == [FILE]


def test_other_teachers_damaged_and_missing_files_are_refused(tmp_path: Path) -> None:
    save_corrector(tmp_path, make("two_tower"), "teacher-a")
    load_corrector(tmp_path, None)
    with pytest.raises(CheckpointError, match="teacher-a, this one is teacher-b"):
        load_corrector(tmp_path, "teacher-b")
    content = (tmp_path / FILE).read_bytes()
    flipped = bytearray(content)
    flipped[-7] ^= 0x40
    other_width = content.replace(b'width\\": 32', b'width\\": 64')
    assert other_width != content
    for damaged in (b"", b"rubbish" * 9, content[:100], content[:-8], bytes(flipped), other_width):
        (tmp_path / FILE).write_bytes(damaged)
        with pytest.raises(CheckpointError, match="damaged") as error:
            load_corrector(tmp_path, "teacher-a")
        assert "\n" not in str(error.value)
    with pytest.raises(CheckpointError, match="no corrector"):
        load_corrector(tmp_path / "nowhere", "teacher-a")


def test_headers_and_tensors_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    save_corrector(tmp_path, make("two_tower"), "teacher-a")
    path = tmp_path / FILE
    tensors, header = read_tensors(path, FORMAT, "", CheckpointError)
    name, weight = next(iter(tensors.items()))
    config = header["config"]
    for other_tensors, other_config, message in (
        ({name: weight.double()}, {}, "torch.float64, not torch.float32"),
        ({name: weight[..., :1]}, {}, f"{name} should have shape"),
        ({name: torch.full_like(weight, torch.nan)}, {}, "not finite"),
        ({"more": weight.clone()}, {}, "more should have shape none"),
        ({}, {"width": "32"}, "width='32': must be of type int"),
        ({}, {"width": 10**5}, "should have shape"),  # without allocating that much
        ({}, {"max_k": True}, "max_k=True"),
        ({}, {"depth": 3}, "'depth': there is no such setting"),
        ({}, {"architecture": "three_tower"}, "two_tower, temporal"),
    ):
        write_tensors(path, tensors | other_tensors, header | {"config": config | other_config})
        with pytest.raises(CheckpointError, match=message) as error:
            load_corrector(tmp_path, "teacher-a")
        assert "\n" not in str(error.value) and str(path) in str(error.value)
    write_tensors(path, tensors, {"format": FORMAT, "teacher": "teacher-a"})
    with pytest.raises(CheckpointError, match="None is not a mapping"):
        load_corrector(tmp_path, "teacher-a")


def test_a_file_that_may_not_be_read_is_not_called_damaged(tmp_path: Path, denied: Any) -> None:
    save_corrector(tmp_path, make("two_tower"), "teacher-a")
    denied(tmp_path)
    with pytest.raises(FileError, match="Permission denied"):
        load_corrector(tmp_path, "teacher-a")
    with pytest.raises(FileError, match="Permission denied"):
        read_header(tmp_path)


def test_impossible_architectures_are_named() -> None:
    with pytest.raises(ConfigError, match="two_tower, temporal"):
        build_corrector(CorrectorConfig(16, 3, "three_tower"))
    with pytest.raises(ConfigError, match="multiple"):
        build_corrector(CorrectorConfig(16, 3, "temporal", width=36, num_heads=4))


def test_a_history_moves_on_by_a_step() -> None:
    corrector = make("temporal")
    history = corrector.no_history(2)
    assert not history.valid.any() and (history.steps == 0).all()
    for step in (1.0, 2.0, 3.0, 4.0, 5.0):
        history = history.then(torch.full((2, corrector.embedding_dim), step))
        filled = min(int(step), 4)
        assert history.valid.tolist() == [[False] * (4 - filled) + [True] * filled] * 2
    assert history.steps[..., 0].tolist() == [[2.0, 3.0, 4.0, 5.0]] * 2, "the newest is the last"


def test_the_order_of_earlier_steps_counts() -> None:
    corrector, x = make("temporal"), random_input()
    torch.nn.init.normal_(corrector.position, std=0.5)  # type: ignore[arg-type]
    swapped = Steps(*(part[:, [1, 0, 2, 3]] for part in x))
    assert not torch.allclose(act(corrector, swapped), act(corrector, x), atol=1e-3)


@BOTH
def test_every_step_in_plan_up_to_the_last_has_an_embedding(architecture: str) -> None:
    corrector, x = make(architecture), random_input()
    torch.nn.init.normal_(corrector.step.weight)  # type: ignore[union-attr, arg-type]
    answers = [act(corrector, x._replace(k=torch.full_like(x.k, k))) for k in range(8)]
    assert len({tuple(answer.flatten().tolist()) for answer in answers}) == 8


def test_the_distilled_policy_sees_the_real_latent_alone() -> None:
    corrector, x = make("distilled"), random_input()
    expected = act(corrector, x)
    for changed in (
        x._replace(z_pred=x.z_pred + 0.5),
        x._replace(planned=x.planned * 0.5),
        x._replace(k=x.k + 1),
    ):
        torch.testing.assert_close(act(corrector, changed), expected)
    assert not torch.allclose(act(corrector, x._replace(z=x.z + 0.5)), expected)
