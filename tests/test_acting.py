"""Agents in loops that others wrote: what they are handed, PyTorch's modes around them, copies and forks."""

import copy
import os
import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tdmpc2
from tdmpc2.agent import TDMPC2, Kind, SpeculativeAgent, StepInfo
from tdmpc2.config import (
    COMPILED,
    EAGER,
    ComputeConfig,
    CorrectorConfig,
    PlannerConfig,
    SpeculationConfig,
    WorldModelConfig,
)
from tdmpc2.corrector import BaseCorrector, build_corrector, save_corrector
from tdmpc2.errors import ConfigError, ObservationError
from tdmpc2.inference import Compiled
from tdmpc2.world_model import WorldModel, fingerprint, save_world_model

BUDGET = PlannerConfig(horizon=2, iterations=2, num_samples=8, num_elites=4, num_pi_trajs=2)
SIZES: dict[str, Any] = dict(enc_dim=16, mlp_dim=16, latent_dim=16, num_q=3, num_bins=5)
MODELS = {
    "plain": WorldModelConfig((5,), 3, **SIZES),
    "episodic": WorldModelConfig(
        (5,), 3, **SIZES, episodic=True, num_tasks=2, task_dim=8, action_dims=(3, 2)
    ),
    "pixels": WorldModelConfig((9, 64, 64), 3, **SIZES | {"latent_dim": 32}, num_channels=2),
}
MODE = SpeculationConfig(corrector="two_tower", threshold=(0.9,), refine_steps=2)
OBS = np.linspace(-1, 1, 5, dtype=np.float32)


@contextmanager
def seeded() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def randomised(network: Any) -> Any:
    """Weights that matter."""
    for p in network.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return network.eval().requires_grad_(False)


def model_of(kind: str = "plain") -> WorldModel:
    with seeded():
        return randomised(WorldModel(MODELS[kind]))


def corrector_of(model: WorldModel, architecture: str = "two_tower") -> BaseCorrector:
    c = model.config
    with seeded():
        return randomised(
            build_corrector(CorrectorConfig(c.latent_dim, c.action_dim, architecture, width=32))
        )


def teacher_of(model: WorldModel, num_envs: int = 1, compute: ComputeConfig = EAGER) -> TDMPC2:
    task = 0 if model.config.num_tasks else None
    return TDMPC2(model, BUDGET, num_envs=num_envs, task=task, compute=compute)


def speculative(num_envs: int = 1, compute: ComputeConfig = EAGER, mode: SpeculationConfig = MODE) -> Any:
    model = model_of()
    corrector = corrector_of(model) if mode.corrector else None
    return SpeculativeAgent(teacher_of(model, num_envs, compute), mode, corrector)


AGENTS: dict[str, Callable[..., Any]] = {
    "teacher": lambda num_envs=1, compute=EAGER: teacher_of(model_of(), num_envs, compute),
    "speculative": speculative,
}


def observations(config: WorldModelConfig, steps: int = 6) -> np.ndarray:
    rng = np.random.default_rng(0)
    if config.pixels:
        return rng.integers(256, size=(steps, *config.obs_shape), dtype=np.uint8)
    return rng.normal(size=(steps, *config.obs_shape)).astype(np.float32)


def acted(agent: Any, obs: np.ndarray) -> np.ndarray:
    return np.stack([agent.act(o) for o in obs])


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Saved agents of every kind."""
    saved = {}
    for kind, config in MODELS.items():
        model = model_of(kind)
        for architecture in ("", "two_tower", "temporal"):
            saved[f"{kind} {architecture}".strip()] = folder = tmp_path_factory.mktemp("agent")
            mode = {**asdict(MODE), "corrector": architecture} if architecture else None
            save_world_model(
                folder,
                model,
                task="a-task",
                task_index=0 if config.num_tasks else None,
                discount=0.9,
                planner=asdict(BUDGET),
                precision="float32",
                **({"speculation": mode} if mode else {}),
            )
            if mode:
                network = corrector_of(model, architecture)
                save_corrector(folder / "correctors" / architecture, network, fingerprint(model))
    return saved


@pytest.mark.parametrize("kind", ["plain", "plain temporal"])
@pytest.mark.parametrize("around", range(1, 8))
def test_inference_mode_may_be_around_anything(folders: dict[str, Path], kind: str, around: int) -> None:
    """Around loading, acting, resetting, and any of them together."""
    load, act, reset = (torch.inference_mode() if around & bit else nullcontext() for bit in (1, 2, 4))
    usual, obs = tdmpc2.load_agent(folders[kind], compute=EAGER), observations(MODELS["plain"])
    with load:
        agent = tdmpc2.load_agent(folders[kind], compute=EAGER)
    for _ in range(2):
        with act:
            np.testing.assert_array_equal(acted(agent, obs), acted(usual, obs))
            action = agent.act(torch.from_numpy(OBS))
        assert not action.is_inference()
        usual.act(OBS)
        usual.reset()
        with reset:
            agent.reset()
    np.testing.assert_array_equal(acted(agent, obs), acted(usual, obs))


def test_weights_of_a_model_made_in_inference_mode_are_followed() -> None:
    """Such tensors do not tell that they have changed."""
    with torch.inference_mode():
        model = model_of()
        agent = teacher_of(model)
        before = agent.act(OBS)
        for p in model.parameters():
            p.mul_(1.5)
        agent.reset()
    other = model_of()
    for p in other.parameters():
        p.mul_(1.5)
    expected = teacher_of(other)
    expected.act(OBS)
    expected.reset()
    after = agent.act(OBS)
    np.testing.assert_array_equal(after, expected.act(OBS))
    assert not np.array_equal(after, before)


@contextmanager
def float64_by_default() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("architecture", ["", "two_tower", "temporal"])
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("default", [float64_by_default, lambda: torch.device("meta")])
def test_what_new_tensors_are_by_default_does_not_matter(
    folders: dict[str, Path], kind: str, architecture: str, default: Callable
) -> None:
    path, obs = folders[f"{kind} {architecture}".strip()], observations(MODELS[kind])
    expected = acted(tdmpc2.load_agent(path, compute=EAGER), obs)
    with default():
        agent = tdmpc2.load_agent(path, compute=EAGER)
        actions = acted(agent, obs)
        agent.reset([True])
        assert all(x.dtype in (torch.float32, torch.long, torch.bool) for x in agent.info)
    assert actions.dtype == np.float32
    np.testing.assert_array_equal(actions, expected)


def test_loading_leaves_the_global_generator_alone(folders: dict[str, Path]) -> None:
    before = torch.get_rng_state()
    agent = tdmpc2.load_agent(folders["plain temporal"], compute=EAGER)
    acted(agent, observations(MODELS["plain"]))
    assert torch.equal(torch.get_rng_state(), before)


def read_only(x: np.ndarray) -> np.ndarray:
    x = x.copy()
    x.flags.writeable = False
    return x


class Robot:
    """Has an array, as data frames and JAX's arrays do."""

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        return OBS.astype(dtype or OBS.dtype)


GOOD: dict[str, Any] = {
    "list": OBS.tolist(),
    "tuple": tuple(OBS.tolist()),
    "list of NumPy's numbers": list(OBS),
    "list of a list": [OBS.tolist()],
    "reversed view": OBS[::-1].copy()[::-1],
    "every other": np.repeat(OBS, 2)[::2],
    "big-endian": OBS.astype(">f4"),
    "float64": OBS.astype(np.float64),
    "big-endian float64": OBS.astype(">f8"),
    "read-only": read_only(OBS),
    "batch of one": OBS[None],
    "what has an array": Robot(),
    "tensor": torch.from_numpy(OBS),
    "float64 tensor": torch.from_numpy(OBS).double(),
    "tensor with a gradient": torch.from_numpy(OBS.copy()).requires_grad_(),
    "expanded tensor": torch.from_numpy(OBS)[None].expand(3, 5)[1:2],
}


@pytest.mark.parametrize("agent", AGENTS)
@pytest.mark.parametrize("given", GOOD)
def test_numbers_of_any_kind_are_an_observation(agent: str, given: str) -> None:
    x = GOOD[given]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        action = AGENTS[agent]().act(x)
    expected = AGENTS[agent]().act(OBS)
    assert isinstance(action, torch.Tensor if isinstance(x, torch.Tensor) else np.ndarray)
    assert action.shape == ((1, 3) if np.ndim(x) == 2 else (3,))
    np.testing.assert_array_equal(np.asarray(action).reshape(3), expected)


def test_whole_numbers_are_an_observation() -> None:
    expected = AGENTS["teacher"]().act(np.arange(5, dtype=np.float32))
    for dtype in (np.int8, np.uint8, np.int16, np.uint16, np.int64, np.uint64, np.float16):
        np.testing.assert_array_equal(AGENTS["teacher"]().act(np.arange(5, dtype=dtype)), expected)


BAD: dict[str, tuple[Any, str]] = {
    "as reset() returns it": ((OBS, {}), "pass its first entry"),
    "as step() returns it": ((OBS, 0.0, False, False, {}), "pass its first entry"),
    "None": (None, "NoneType"),
    "dict": ({"position": OBS}, "dict"),
    "text": ("observation", "str"),
    "list of texts": (["1"] * 5, "list"),
    "bytes": (OBS.tobytes(), "bytes"),
    "list of None": ([0.0, None, 0.0, 0.0, 0.0], "list"),
    "ragged list": ([[0.0], [0.0, 1.0]], "list"),
    "objects": (np.array([0.0, None, 1, "a", {}], dtype=object), "ndarray"),
    "complex": (OBS.astype(complex), "complex"),
    "complex tensor": (torch.zeros(5, dtype=torch.complex64), "complex64"),
    "sparse tensor": (torch.zeros(5).to_sparse(), "sparse"),
    "meta tensor": (torch.zeros(5, device="meta"), "meta"),
    "dates": (np.zeros(5, dtype="datetime64[s]"), "datetime64"),
    "one number": (0.0, r"shape \(\)"),
    "nothing": ([], r"shape \(0,\)"),
    "too long": (np.zeros(6), r"shape \(6,\); this agent takes \(1, 5\)"),
    "two rows": (np.zeros((2, 5)), r"shape \(2, 5\)"),
    "NaN": (np.full(5, np.nan), "NaN"),
    "infinity": (np.full(5, -np.inf), "NaN or infinity"),
    "too large for float32": (np.full(5, 1e300), "NaN or infinity"),
    "FLT_MAX": (np.full(5, np.finfo(np.float32).max), "too large"),
}


@pytest.mark.parametrize("agent", AGENTS)
def test_what_is_no_observation_is_said_before_anything_changes(agent: str) -> None:
    mine, twin, obs = AGENTS[agent](), AGENTS[agent](), observations(MODELS["plain"], len(BAD) + 1)
    assert mine.info is None
    for o, (bad, message) in zip(obs, BAD.values(), strict=False):
        with warnings.catch_warnings(), pytest.raises(ObservationError, match=message) as e:
            warnings.simplefilter("error")
            mine.act(bad)
        assert "\n" not in str(e.value)
        np.testing.assert_array_equal(mine.act(o), twin.act(o))
        assert repr(mine.info) == repr(twin.info)


def test_pixels_are_whole_numbers_from_0_to_255() -> None:
    agent = teacher_of(model_of("pixels"))
    frames = observations(MODELS["pixels"], 1)[0]
    expected = agent.act(frames)
    assert not np.array_equal(teacher_of(model_of("pixels")).act(frames // 2), expected)
    for given in (frames.astype(np.int64), frames.tolist(), frames[::-1].copy()[::-1]):
        np.testing.assert_array_equal(teacher_of(model_of("pixels")).act(given), expected)
    tensor = teacher_of(model_of("pixels")).act(torch.from_numpy(frames)[None])
    np.testing.assert_array_equal(tensor.numpy()[0], expected)
    for bad in (
        frames.astype(np.float32),
        frames / np.float32(255),
        np.zeros(frames.shape, dtype=np.float32),
        np.full(frames.shape, np.nan),
        frames.astype(np.int16) - 1,
        frames.astype(np.uint16) + 1,
        np.full(frames.shape, 2**63, dtype=np.uint64),
        torch.from_numpy(frames).bfloat16(),
    ):
        with pytest.raises(ObservationError, match="0 to 255"):
            agent.act(bad)
    with pytest.raises(ObservationError, match=r"shape \(64, 64, 9\)"):
        agent.act(frames.transpose(1, 2, 0))


MASK = [True, False, True]
MASKS: list[Any] = [
    MASK,
    tuple(MASK),
    np.array(MASK),
    np.array(MASK)[::-1],
    *(np.array(MASK, dtype=dtype) for dtype in (np.int64, np.uint8, np.uint16, ">i4", np.float32, float)),
    torch.tensor(MASK),
    *(torch.tensor(MASK, dtype=dtype) for dtype in (torch.long, torch.uint8, torch.float32, torch.bfloat16)),
    [1, 0, 1],
    [1.0, 0.0, 1.0],
]


BAD_MASKS: list[Any] = [
    *([0, 2], [True], True, 1, MASK * 2, [MASK], {}, "101"),  # other shapes
    *([0, 1, 2], [-1, 0, 1], [0.5, 0, 1], [np.nan, 0, 1]),  # other values
    *(["1", "0", "1"], [None] * 3, torch.zeros(3, dtype=torch.complex64)),
]


@pytest.mark.parametrize("agent", AGENTS)
def test_masks_of_any_kind_say_which_rows_begin_an_episode(agent: str) -> None:
    obs = observations(MODELS["plain"], 9).reshape(3, 3, 5)

    def after(reset: Callable[[Any], None]) -> np.ndarray:
        mine = AGENTS[agent](num_envs=3)
        acted(mine, obs[:2])
        reset(mine)
        return mine.act(obs[2])

    def by_hand(mine: Any) -> None:
        for row in (0, 2):
            mine.reset(torch.arange(3) == row)

    expected, none = after(by_hand), after(lambda mine: None)
    assert (np.abs(expected - none).max(1) > 1e-6).tolist()[::2] == [True, True]
    for mask in MASKS:
        np.testing.assert_array_equal(after(lambda mine, mask=mask: mine.reset(mask)), expected)
    everybody = after(lambda mine: mine.reset([1, 1, 1]))
    np.testing.assert_array_equal(after(lambda mine: mine.reset()), everybody)
    assert not np.array_equal(everybody, expected)
    mine = AGENTS[agent](num_envs=3)
    for bad in BAD_MASKS:
        with pytest.raises(ConfigError, match="mask") as e:
            mine.reset(bad)
        assert "\n" not in str(e.value)


def test_one_row_may_leave_out_the_axis_of_a_mask_too() -> None:
    agent = speculative()
    agent.act(OBS)
    agent.reset(False)
    agent.act(OBS)
    assert agent.info.k == 1
    agent.reset(np.bool_(True))
    agent.act(OBS)
    assert agent.info.k == 0


@pytest.mark.parametrize("num_envs", [0, -1, 1.5, "2"])
def test_there_is_at_least_one_environment(folders: dict[str, Path], num_envs: Any) -> None:
    with pytest.raises(ConfigError, match=f"num_envs={num_envs}"):
        tdmpc2.load_agent(folders["plain"], num_envs=num_envs)


@pytest.mark.parametrize("seed", ["a", None, 2**64, -(2**64), np.nan])
def test_a_seed_is_a_whole_number(folders: dict[str, Path], seed: Any) -> None:
    with pytest.raises(ConfigError, match=f"seed={seed}"):
        tdmpc2.load_agent(folders["plain"], seed=seed)


def test_the_public_face() -> None:
    assert tdmpc2.Kind is Kind and tdmpc2.StepInfo is StepInfo
    assert tdmpc2.envs.make_env is tdmpc2.make_env and tdmpc2.envs.PadForModel
    assert all(hasattr(tdmpc2, name) for name in tdmpc2.__all__)
    with pytest.raises(AttributeError, match="nothing"):
        _ = tdmpc2.nothing


def test_both_agents_have_one_interface() -> None:
    """A loop that knows only one of them does with the other."""
    for kind in AGENTS:
        agent = AGENTS[kind](num_envs=2)
        assert agent.num_envs == 2 and agent.info is None
        agent.reset()
        for eval_mode in (True, False):
            assert agent.act(np.stack([OBS, OBS]), eval_mode=eval_mode).shape == (2, 3)
            assert agent.info.kinds[0] in Kind and len(agent.info.kinds) == 2
    info = AGENTS["teacher"]
    teacher = info()
    teacher.act(OBS)
    news = "asked=1, arrived=1, taken=1, age=0"
    assert repr(teacher.info) == f"kind=PLANNED, k=0, mismatch=nan, correction=0, {news}"


def test_info_reads_in_words() -> None:
    one = torch.ones(1)
    yes = one > 0
    info = StepInfo(one.long(), 2 * one.long(), one / 3, one / 7, yes, yes, ~yes, 4 * one.long())
    news = "asked=1, arrived=1, taken=0, age=4"
    assert str(info) == f"kind=CORRECTED, k=2, mismatch=0.3333, correction=0.1429, {news}"
    assert info.kinds == [Kind.CORRECTED]
    rows = StepInfo(*(torch.cat([x, torch.zeros_like(x)]) for x in info))
    assert "kind=[CORRECTED, PLANNED], k=[2, 0], mismatch=[0.3333, 0]" in repr(rows)


def test_exploration_moves_the_first_action_of_each_plan() -> None:
    mode = SpeculationConfig(execution_horizon=2)
    exploring, twin = speculative(mode=mode), speculative(mode=mode)
    plans: list[Any] = []
    for agent in (exploring, twin):
        plan = agent.teacher.planner.plan
        agent.teacher.planner.plan = lambda *a, plan=plan, **k: plans.append(plan(*a, **k)) or plans[-1]
    first, second = exploring.act(OBS, eval_mode=False), exploring.act(OBS, eval_mode=False)
    usual = twin.act(OBS)
    np.testing.assert_array_equal(first, plans[0].actions[0, 0])
    np.testing.assert_array_equal(second, plans[0].mean[0, 1])
    np.testing.assert_array_equal(usual, plans[1].mean[0, 0])
    assert torch.equal(plans[0].mean, plans[1].mean)
    assert not torch.equal(plans[0].actions, plans[1].actions), "the noise of exploration"
    every_step, teacher = SpeculationConfig(execution_horizon=1), AGENTS["teacher"]()
    agent = speculative(mode=every_step)
    for o in observations(MODELS["plain"]):
        np.testing.assert_array_equal(agent.act(o, eval_mode=False), teacher.act(o, eval_mode=False))


def test_what_is_written_to_an_action_stays_with_the_user() -> None:
    for obs in (OBS, torch.from_numpy(OBS)):
        agent, twin = speculative(), speculative()
        for _ in range(3):
            action = agent.act(obs)
            assert np.array_equal(action, twin.act(obs))
            action *= 0
            assert repr(agent.info) == repr(twin.info)


@pytest.mark.parametrize("agent", AGENTS)
@pytest.mark.parametrize("compute", [EAGER, COMPILED])
def test_copies_act_as_the_agent_itself(agent: str, compute: ComputeConfig, monkeypatch) -> None:
    """Each with a state and a generator of its own; libraries are opened anew (tests/test_ahead.py)."""

    def library(name: str, make: Any) -> Any:
        raise RuntimeError("not compiled in this test")

    monkeypatch.setattr("tdmpc2.inference.ahead.library", library)
    mine, obs = AGENTS[agent](compute=compute), observations(MODELS["plain"])
    copies = [copy.deepcopy(mine), pickle.loads(pickle.dumps(mine))]
    expected = acted(mine, obs)
    for other in copies:
        np.testing.assert_array_equal(acted(other, obs), expected)
    copies = [copy.deepcopy(mine), pickle.loads(pickle.dumps(mine))]
    mine.reset()
    expected = acted(mine, obs)
    for other in copies:
        other.reset()
        np.testing.assert_array_equal(acted(other, obs), expected)


@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_copies_compile_anew(cuda_graphs: bool, monkeypatch) -> None:
    times: list[dict[str, Any]] = []
    monkeypatch.setattr(torch, "compile", lambda f, **how: times.append(how) or (lambda x: f(x)))
    compiled = Compiled(torch.sin, what="it", device=torch.device("cpu"), cuda_graphs=cuda_graphs)
    x = torch.ones(2)
    assert torch.equal(compiled(x), x.sin()) and torch.equal(compiled(x), x.sin())
    for other in (copy.deepcopy(compiled), pickle.loads(pickle.dumps(compiled))):
        assert torch.equal(other(x), x.sin()) and torch.equal(other(x), x.sin())
    assert len(times) == 3 and ("mode" in times[0]) == cuda_graphs


def test_only_on_a_cpu_the_wrapper_is_compiled(monkeypatch) -> None:
    """On an H100 the backward pass of an update with it failed to compile."""
    seen: list[Any] = []
    monkeypatch.setattr(torch, "compile", lambda f, options: seen.append(options) or f)
    for device in ("cpu", "cuda"):
        Compiled(torch.sin, what="it", device=torch.device(device))(torch.ones(2))
    assert seen[0]["cpp_wrapper"] and seen[1] is None


FORK = """
import os, signal, torch
from tdmpc2.agent import TDMPC2
from tdmpc2.config import PlannerConfig, WorldModelConfig
from tdmpc2.world_model import WorldModel

torch.set_num_threads(2)
agent = TDMPC2(WorldModel(WorldModelConfig((5,), 3, latent_dim=128)).eval(), PlannerConfig(iterations=1))
agent.act([0.0] * 5)
x = torch.ones(500, 500)
torch.mm(x, x)
child = os.fork()
if not child:
    signal.alarm(20)
    agent.act([0.0] * 5)
    torch.mm(x, x)
    os._exit(17)
assert torch.get_num_threads() == 2
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no forks here")
def test_a_forked_process_acts() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    run = subprocess.run([sys.executable, "-c", FORK], capture_output=True, text=True, env=environment)
    assert run.stdout.strip() == "17", run.stdout + run.stderr


ACTS = """
import sys, tdmpc2
from tdmpc2.config import EAGER
print(tdmpc2.load_agent(sys.argv[1], compute=EAGER).act([0.0] * 5).shape)
print(*sorted(sys.modules.keys() & set(sys.argv[2:])))
"""


def test_what_acting_does_not_need_is_not_imported(folders: dict[str, Path]) -> None:
    """Each takes a good part of a second, or more; loading a corrector needs no compiler either."""
    large = ["pandas", "scipy", "hydra", "omegaconf", "rich", "gymnasium", "mujoco", "torch._dynamo", "sympy"]
    command = [sys.executable, "-c", ACTS, str(folders["plain two_tower"]), *large, "torch"]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert run.stdout.splitlines() == ["(3,)", "torch"]
