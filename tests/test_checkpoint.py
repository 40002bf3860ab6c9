"""Checkpoints that cannot be what they claim are refused in one line; all published shapes are read."""

import json
import math
import os
import pickle
import re
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import tdmpc2
from tdmpc2.config import (
    EAGER,
    MODEL_SIZES,
    BudgetOverride,
    ModelOverride,
    SpeculationConfig,
    WorldModelConfig,
)
from tdmpc2.corrector import build_corrector, save_corrector
from tdmpc2.envs import dmc
from tdmpc2.errors import CheckpointError, ConfigError, FileError, TaskError
from tdmpc2.files import read_json, write_json, write_tensors
from tdmpc2.teacher import open_teacher
from tdmpc2.world_model import WorldModel, fingerprint, load_world_model, save_world_model
from tdmpc2.world_model.checkpoint import MT30, WEIGHTS, published_task_index, spelling

OFFICIAL = Path(__file__).parent / "fixtures/official"


def official(name: str = "state_small") -> dict[str, Any]:
    """The entries of an original file."""
    return dict(torch.load(OFFICIAL / f"{name}.pt", weights_only=True)["model"])


def written(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


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
            tdmpc2.load_agent(tmp_path)
    save_world_model(tmp_path, model)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["world_model"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError):
        load_world_model(tmp_path)


def oldest(state: dict[str, Any]) -> dict[str, Any]:
    """The entries of an old file in the oldest naming, whose layers are Linear, LayerNorm and activation."""
    flat = {}
    for name, value in state.items():
        parts = r"(_encoder\.state|_dynamics|_reward|_pi)\.(\d)\.(ln\.)?(weight|bias)"
        if found := re.fullmatch(parts, name):
            part, layer, norm, what = found.groups()
            index = 3 * int(layer) + bool(norm) + (part == "_encoder.state")
            inside = f"{index}" if part != "_dynamics" else "1" if index == 7 else f"0.{index}"
            name = f"{part}.{inside}.{what}"
        flat[name] = value
    return flat


@pytest.mark.parametrize("name", ["state_small_old_format", "mt30_small_old_format"])
def test_the_oldest_naming_holds_the_same_teacher(tmp_path: Path, name: str) -> None:
    state = oldest(official(name))
    for layer in ("_encoder.state.1", "_dynamics.0.6", "_dynamics.1", "_reward.4", "_pi.6"):
        assert f"{layer}.weight" in state
    model = load_world_model(written(tmp_path / "flat.pt", {"model": state}))
    expected = load_world_model(OFFICIAL / f"{name}.pt")
    assert fingerprint(model) == fingerprint(expected) and model.config == expected.config
    del state["_dynamics.0.3.weight"]
    refused(written(tmp_path / "part.pt", state), "dynamics.1.weight", "missing")


@pytest.mark.parametrize(
    "rename",
    [
        lambda n: f"_orig_mod.{n}",
        lambda n: f"module.{n}",
        lambda n: f"model.{n}",
        lambda n: f"module._orig_mod.agent.model.{n}",
        lambda n: re.sub(r"^(_dynamics|_pi)\.", r"\1._orig_mod.", n),
    ],
)
@pytest.mark.parametrize("name", ["mt30_small", "state_small_old_format"])
def test_what_stands_in_front_of_the_names_does_not_matter(
    tmp_path: Path, name: str, rename: Callable[[str], str]
) -> None:
    state = {rename(n): value for n, value in official(name).items()}
    model = load_world_model(written(tmp_path / "a.pt", state))
    expected = load_world_model(OFFICIAL / f"{name}.pt")
    assert fingerprint(model) == fingerprint(expected) and model.config == expected.config


@pytest.mark.parametrize("keys", [(), ("model",), ("state_dict",), ("model", "state_dict")])
def test_a_state_dict_may_lie_under_other_keys(tmp_path: Path, keys: tuple[str, ...]) -> None:
    content = official()
    for key in keys:
        content = {key: content, "epoch": 3, "metadata": None}
    model = load_world_model(written(tmp_path / "a.pt", content))
    assert fingerprint(model) == fingerprint(load_world_model(OFFICIAL / "state_small.pt"))


def test_two_models_in_one_file_are_not_mixed(tmp_path: Path) -> None:
    state = official() | {f"ema.{name}": value for name, value in official().items()}
    refused(written(tmp_path / "a.pt", state), "more than one")


def test_target_heads_may_be_missing(tmp_path: Path) -> None:
    state = {n: v for n, v in official().items() if not n.startswith("_target_Qs")}
    path = written(tmp_path / "a.pt", state)
    model, whole = load_world_model(path), load_world_model(OFFICIAL / "state_small.pt")
    for name, weights in model.q.state_dict().items():
        target = model.target_q.state_dict()[name]
        assert torch.equal(weights, whole.q.state_dict()[name]) and torch.equal(weights, target)
        assert weights.data_ptr() != target.data_ptr()
    obs = torch.linspace(-1, 1, 24)
    actions = [tdmpc2.load_agent(p, compute=EAGER).act(obs) for p in (path, OFFICIAL / "state_small.pt")]
    assert torch.equal(*actions)
    del state["_Qs.params.1.weight"]
    refused(written(path, state), "q.1.weight", "missing")


def test_models_of_plain_regression_are_refused(tmp_path: Path) -> None:
    state = official()
    for name in ("_reward.2", "_Qs.params.2", "_target_Qs_params.2"):
        state[f"{name}.weight"] = state[f"{name}.weight"][..., :1, :]
        state[f"{name}.bias"] = state[f"{name}.bias"][..., :1]
    refused(written(tmp_path / "a.pt", state), "num_bins=1", "regression")


def test_what_an_original_file_does_not_say_can_be_given(tmp_path: Path) -> None:
    path, given = OFFICIAL / "state_small.pt", {"vmin": -5.0, "vmax": 4, "simnorm_dim": 4}
    model, usual = load_world_model(path, **given), load_world_model(path)
    assert (model.config.vmin, model.config.vmax, model.config.simnorm_dim) == (-5, 4, 4)
    obs, action = torch.linspace(-1, 1, 24), torch.zeros(6)
    assert (model.encode(obs).view(8, 4).sum(-1) - 1).abs().max() < 1e-5
    assert fingerprint(model) != fingerprint(usual), "what is made for the one does not fit the other"
    z = usual.encode(obs)
    assert model.reward(z, action) != usual.reward(z, action)
    assert tdmpc2.load_agent(path, compute=EAGER, **given).model.config == model.config
    teacher = open_teacher("walker-walk", str(path), BudgetOverride(), ModelOverride(-5, 4, 4))
    assert teacher.model.config == model.config
    for wrong in ({"vmin": 20.0}, {"vmax": math.nan}, {"simnorm_dim": 5}, {"simnorm_dim": "8"}):
        with pytest.raises(CheckpointError, match=next(iter(wrong))):
            load_world_model(path, **wrong)
    save_world_model(tmp_path, model)
    assert fingerprint(load_world_model(tmp_path)) == fingerprint(model)
    assert load_world_model(tmp_path).config == load_world_model(tmp_path, vmin=-5).config == model.config
    with pytest.raises(ConfigError, match=r"vmin=-6.*has vmin=-5"):
        load_world_model(tmp_path, vmin=-6)


def test_tasks_of_the_published_sets_are_found_under_every_spelling() -> None:
    for task in ("walker-walk", "Walker_Walk", "walker_walk"):
        assert published_task_index(task, 30) == 1
    for task in ("cup-catch", "ball_in_cup-catch", "Cup-Catch", "ball-in-cup-catch"):
        assert published_task_index(task, 80) == 12
    assert published_task_index("pendulum-spin", 80) == 29
    assert published_task_index("mw-assembly", 80) == 30 and published_task_index("mw-hand-insert", 80) == 79
    known = {spelling(name): task for name, task in dmc.tasks().items()}
    assert all(known[spelling(name)] == task for name, task in dmc.tasks().items())
    assert sum(name in known for name in MT30) == 19
    with pytest.raises(CheckpointError, match="published"):
        published_task_index("walker-walk", 12)
    for task in ("humanoid-walk", "mw-assembly", ""):
        with pytest.raises(CheckpointError, match="not trained on"):
            published_task_index(task, 30)


def test_a_multi_task_agent_by_the_name_of_its_task(tmp_path: Path) -> None:
    path, obs = OFFICIAL / "mt30_small.pt", torch.linspace(-1, 1, 24)
    by_name, by_index = (tdmpc2.load_agent(path, task=t, compute=EAGER) for t in ("ball_in_cup-catch", 12))
    assert torch.equal(by_name.act(obs), by_index.act(obs))
    assert open_teacher("Cup-Catch", str(path), BudgetOverride()).task_index == 12
    assert tdmpc2.load_agent(path, task="walker-walk-backwards", compute=EAGER).task is not None
    for task, error in (("humanoid-walk", CheckpointError), (30, ConfigError), (None, ConfigError)):
        with pytest.raises(error):
            tdmpc2.load_agent(path, task=task)
    with pytest.raises(TaskError, match="knows walker-walk-backwards, but no environment"):
        open_teacher("walker-walk-backwards", str(path), BudgetOverride())
    with pytest.raises(CheckpointError, match="not trained on humanoid-walk"):
        open_teacher("humanoid-walk", str(path), BudgetOverride())
    save_world_model(tmp_path, by_name.model, task="cup-catch", task_index=12)
    for task in (None, 12, "Cup-Catch"):
        assert tdmpc2.load_agent(tmp_path, task=task, compute=EAGER).task.tolist() == [12]
    for task in (1, "walker-walk"):
        with pytest.raises(CheckpointError, match="made for cup-catch"):
            tdmpc2.load_agent(tmp_path, task=task)


def test_a_single_task_agent_by_the_name_of_its_task(tmp_path: Path) -> None:
    path = OFFICIAL / "state_small.pt"
    assert tdmpc2.load_agent(path, task="walker-walk", compute=EAGER).task is None
    save_world_model(tmp_path, load_world_model(path), task="ball_in_cup-catch")
    tdmpc2.load_agent(tmp_path, task="cup-catch", compute=EAGER)
    with pytest.raises(CheckpointError, match="was made for ball_in_cup-catch; walker-walk is another task"):
        tdmpc2.load_agent(tmp_path, task="walker-walk", compute=EAGER)
    with pytest.raises(ConfigError, match="single task"):
        tdmpc2.load_agent(path, task=0)


def test_what_to_give_instead_is_said(tmp_path: Path) -> None:
    model = load_world_model(OFFICIAL / "state_small.pt")
    run = tmp_path / "runs/x/1"
    write_json(run / "train_config.json", {})
    write_tensors(run / "checkpoint.safetensors", {}, {"format": "x"})
    refused(run, "without a teacher", "first evaluation")
    teacher = run / "teacher"
    save_world_model(teacher, model)
    for path in (run, run / "checkpoint.safetensors", run / "train_config.json"):
        refused(path, f"give its teacher, {teacher}")
    for name in (WEIGHTS, "config.json"):
        refused(teacher / name, f"give {teacher}")
    refused(run.parent, "config.json")
    save_world_model(tmp_path / "several/a", model)
    refused(tmp_path / "several", f"give one of them, e.g. {tmp_path / 'several/a'}")
    shutil.copy(teacher / WEIGHTS, tmp_path / "alone.safetensors")
    refused(tmp_path / "alone.safetensors", "alone", ".pt", "config.json")
    write_json(tmp_path / "accelerated/settings.json", {})
    (tmp_path / "accelerated/data").mkdir()
    refused(tmp_path / "accelerated", "unfinished", "run it again")
    write_tensors(tmp_path / "two_tower/corrector.safetensors", {}, {"format": "x"})
    refused(tmp_path / "two_tower", "corrector", "teacher")


@pytest.mark.parametrize("name", ["state_small.pt", "folder"])
def test_every_changed_bit_of_weights_is_noticed(tmp_path: Path, name: str) -> None:
    """Or else it is one that says nothing: the weights are the same."""
    model = load_world_model(OFFICIAL / "state_small.pt")
    whole, path = fingerprint(model), tmp_path / name
    if name == "folder":
        save_world_model(path, model)
    elif name == "state_small.pt":
        shutil.copy(OFFICIAL / name, path)
    file = path / WEIGHTS if path.is_dir() else path
    content = file.read_bytes()
    generator = torch.Generator().manual_seed(0)
    noticed = 0
    for position in torch.randint(len(content), (100,), generator=generator).tolist():
        changed = bytearray(content)
        changed[position] ^= 1 << position % 8
        file.write_bytes(changed)
        try:
            assert fingerprint(load_world_model(path)) == whole
        except CheckpointError as e:
            noticed += 1
            assert "\n" not in str(e)
    assert noticed > 60


def test_shipped_teachers_have_digests() -> None:
    for weights in Path(__file__).parents[1].glob(f"pretrained/*/{WEIGHTS}"):
        with safe_open(weights, "pt") as file:
            assert json.loads(file.metadata()["tdmpc2"])["digest"]


def test_weights_of_earlier_versions_have_no_digest_and_load(tmp_path: Path) -> None:
    model = load_world_model(OFFICIAL / "state_small.pt")
    save_world_model(tmp_path, model)
    save_file(load_file(tmp_path / WEIGHTS), tmp_path / WEIGHTS)
    assert fingerprint(load_world_model(tmp_path)) == fingerprint(model)


def test_weights_of_another_model_beside_a_config(tmp_path: Path) -> None:
    model = load_world_model(OFFICIAL / "state_small.pt")
    save_world_model(tmp_path / "a", model)
    model.policy[0].bias += 1
    save_world_model(tmp_path / "b", model)
    shutil.copy(tmp_path / "a" / WEIGHTS, tmp_path / "b" / WEIGHTS)
    refused(tmp_path / "b", "of another model than config.json")


KEY = "_reward.1.weight"


NO_WEIGHTS: dict[str, Callable[[], Tensor]] = {
    "sparse": lambda: torch.zeros(48, 48).to_sparse(),
    "quantised": lambda: torch.quantize_per_tensor(torch.zeros(48, 48), 0.1, 0, torch.qint8),
    "integers": lambda: torch.zeros(48, 48, dtype=torch.int64),
    "complex": lambda: torch.zeros(48, 48, dtype=torch.complex64),
    "4 TB": lambda: torch.zeros(1, dtype=torch.float16).expand(10**6, 10**6),
    "NaN": lambda: torch.full((48, 48), math.nan),
    "beyond float32": lambda: torch.full((48, 48), 1e300, dtype=torch.float64),
    "empty": lambda: torch.zeros(48, 0),
}


@pytest.mark.filterwarnings("ignore::UserWarning")  # quantised tensors are on their way out
@pytest.mark.parametrize("kind", NO_WEIGHTS)
def test_tensors_that_are_no_weights(tmp_path: Path, kind: str) -> None:
    refused(written(tmp_path / "a.pt", {**official(), KEY: NO_WEIGHTS[kind]()}))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_weights_of_other_precisions_are_read(tmp_path: Path, dtype: torch.dtype) -> None:
    state = {n: v.to(dtype) if n.endswith(("weight", "bias")) else v for n, v in official().items()}
    model = load_world_model(written(tmp_path / "a.pt", state))
    assert model.reward_head[1].weight.dtype == torch.float32
    torch.testing.assert_close(model.reward_head[1].weight, official()[KEY], rtol=0.01, atol=0.01)


def test_entries_that_are_no_settings(tmp_path: Path) -> None:
    wrong: list[tuple[str, str, list[Any]]] = [
        ("state_small", "log_std_min", [[], "x", math.nan, math.inf, 10**400, torch.zeros(2), {}]),
        (
            "mt30_small",
            "_action_masks",
            ["x", torch.zeros(30), torch.zeros(30, 6), torch.eye(30).to_sparse()],
        ),
        ("mt30_small", "_task_emb.weight", [torch.zeros(30), torch.zeros(4, 96)]),
    ]
    for source, name, values in wrong:
        for value in values:
            refused(written(tmp_path / "a.pt", {**official(source), name: value}))


def test_compressed_files_and_plain_pickles_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    with zipfile.ZipFile(OFFICIAL / "state_small.pt") as source, zipfile.ZipFile(path, "w") as target:
        for entry in source.infolist():
            target.writestr(entry.filename, source.read(entry), zipfile.ZIP_DEFLATED)
    refused(path, "unpacks to more")
    path.write_bytes(pickle.dumps({"model": {}}))
    refused(path, "no PyTorch file")
    torch.save(official(), path, _use_new_zipfile_serialization=False)
    refused(path, "no PyTorch file")


def test_files_that_cannot_be_read_are_not_called_damaged(tmp_path: Path, denied: Any) -> None:
    model = load_world_model(OFFICIAL / "state_small.pt")
    save_world_model(tmp_path / "folder", model, task="x")
    shutil.copy(OFFICIAL / "state_small.pt", tmp_path / "a.pt")
    os.mkfifo(tmp_path / "pipe.pt")
    for content in ("pipe.pt", "\0.pt", "a" * 300):
        with pytest.raises(FileError, match=r"cannot be read|regular"):
            load_world_model(tmp_path / content)
    shutil.copytree(tmp_path / "folder", tmp_path / "half")
    (tmp_path / "half" / WEIGHTS).unlink()
    with pytest.raises(FileError, match=r"model\.safetensors cannot be read: No such file"):
        load_world_model(tmp_path / "half")
    denied(tmp_path)
    for path in (tmp_path / "folder", tmp_path / "a.pt"):
        for load in (load_world_model, tdmpc2.load_agent):
            with pytest.raises(FileError, match="Permission denied"):
                load(path)


def accelerated(folder: Path) -> Path:
    """A small agent with a corrector."""
    model = load_world_model(OFFICIAL / "state_small.pt")
    config = tdmpc2.config.CorrectorConfig(32, 6, width=16, num_heads=2)
    save_corrector(folder / "correctors/two_tower", build_corrector(config), fingerprint(model))
    save_world_model(
        folder,
        model,
        task="walker-walk",
        task_index=None,
        discount=0.99,
        planner={"horizon": 3, "num_samples": 16, "num_elites": 4, "num_pi_trajs": 2, "iterations": 1},
        precision="float32",
        speculation={"execution_horizon": 3, "corrector": "two_tower", "threshold": [0.5]},
    )
    return folder


def test_no_value_of_a_wrong_type_or_size_in_config_json_gets_further(tmp_path: Path) -> None:
    folder = accelerated(tmp_path)
    agent = tdmpc2.load_agent(folder, compute=EAGER)
    assert isinstance(agent, tdmpc2.SpeculativeAgent)
    assert agent.config == SpeculationConfig(execution_horizon=3, corrector="two_tower", threshold=(0.5,))
    good = read_json(folder / "config.json")
    parts = [((), good), *(((part,), good[part]) for part in ("world_model", "planner", "speculation"))]
    for path, settings in parts:
        for name in settings:
            for wrong in (math.nan, 10**30, [math.nan]):
                changed = json.loads(json.dumps(good))
                (changed[path[0]] if path else changed)[name] = wrong
                (folder / "config.json").write_text(json.dumps(changed))
                with pytest.raises(tdmpc2.TDMPC2Error) as caught:
                    tdmpc2.load_agent(folder, compute=EAGER)
                assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
    for raw in ("", "[", "null", "[]", "5", '"x"', "[" * 5000, "{}"):
        (folder / "config.json").write_text(raw)
        refused(folder, "damaged")


def test_a_corrector_is_named_not_located(tmp_path: Path) -> None:
    folder = accelerated(tmp_path / "agent")
    shutil.copytree(folder / "correctors/two_tower", tmp_path / "elsewhere")
    config = read_json(folder / "config.json")
    for name in ("../../elsewhere", str(tmp_path / "elsewhere"), "..", "three_tower"):
        config["speculation"]["corrector"] = name
        write_json(folder / "config.json", config)
        with pytest.raises(CheckpointError, match="names a corrector"):
            tdmpc2.load_agent(folder)


def test_opening_an_agent_leaves_the_global_generator_alone(tmp_path: Path) -> None:
    folder = accelerated(tmp_path)
    before = torch.get_rng_state()
    tdmpc2.load_agent(folder, compute=EAGER)
    load_world_model(OFFICIAL / "state_small.pt")
    assert torch.equal(torch.get_rng_state(), before)
