"""Export an agent to ONNX: graphs, their description, and a program that acts without PyTorch.

    step.onnx        one control step: observation and state in, action and next state out
    prior.onnx       the planner's samples that follow the policy prior
    iteration.onnx   one iteration of the planner
    manifest.json    inputs, outputs and settings
    run.py           acts; needs NumPy and ONNX Runtime only
    check.npz        steps of the PyTorch agent with its noise, which `run.py` repeats

The graphs take one robot, without a batch axis. They are float32 with the weights inside. They draw no noise
and keep no state: both are inputs. No graph encodes alone: `step.onnx` also gives the latent, so a step that
plans calls it twice, first without and then with the new plan.
"""

import importlib.util
import logging
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .agent import SpeculativeAgent
from .control import Arrival, ControlStep
from .corrector import History
from .errors import ConfigError
from .files import atomic_folder, exists, read_json, write_json
from .inference import Function
from .inference.fast_model import FastModel, origin
from .inference.weights import copy_weights
from .planner import Iteration, NoiseSource, prior_trajectories
from .provenance import provenance
from .step import PlanState
from .world_model.checkpoint import fingerprint

FORMAT = "tdmpc2-onnx-1"
PACKAGES = ("onnx", "onnxscript", "onnxruntime")
PROGRAM, MANIFEST, CHECK = "run.py", "manifest.json", "check.npz"
TOLERANCE = 1e-4  # of actions in [-1, 1], between this program and `run.py`
OPSET = 20
PLANS = 12  # in `check.npz` at most; the noise of a plan can take hundreds of kilobytes
TRIES = 4  # of recording steps that the exported agent repeats


class Port(NamedTuple):
    """An input of a graph, or an output."""

    name: str
    meaning: str
    value: Tensor  # an example
    more: Mapping[str, Any] = {}  # further entries for the manifest

    def described(self) -> dict[str, Any]:
        dtype = str(self.value.dtype).removeprefix("torch.")
        about = {"name": self.name, "dtype": dtype, "shape": list(self.value.shape)}
        return {**about, **self.more, "meaning": self.meaning}


class Graph(NamedTuple):
    """A function to export. Its arguments are the values of `inputs`."""

    run: Callable[..., tuple[Tensor, ...]]
    inputs: list[Port]
    outputs: dict[str, str]  # names and meanings

    def described(self) -> dict[str, Any]:
        values = self.run(*(port.value for port in self.inputs))
        named = zip(self.outputs.items(), values, strict=True)
        outputs = [Port(name, meaning, value) for (name, meaning), value in named]
        return {
            "inputs": [port.described() for port in self.inputs],
            "outputs": [port.described() for port in outputs],
        }


class Exported(NamedTuple):
    """What `export` wrote."""

    sizes: dict[str, int]  # bytes by file
    difference: float  # the largest between actions of the PyTorch agent and of the exported one
    steps: int  # recorded
    plans: int  # made in these steps


Act = Callable[[np.ndarray], np.ndarray]  # an observation `[*obs_shape]` to an action `[A]`
# Runs an episode: `observe(seed, steps, act)` calls `act` with each observation, at most `steps` times.
Observe = Callable[[int, int, Act], None]


def check_packages() -> None:
    """Raise ConfigError if a package that exporting needs is missing."""
    if missing := [name for name in PACKAGES if importlib.util.find_spec(name) is None]:
        raise ConfigError(
            f"exporting needs {', '.join(missing)}: `pip install 'speculative-tdmpc2[export]'`, or "
            f"`pip install {' '.join(missing)}`"
        )


def check_out(out: str | Path, overwrite: bool) -> None:
    """Raise ConfigError if an export to the folder `out` would replace something else.

    Args:
        out: may be missing, empty, or hold an exported agent.
        overwrite: replaces an exported agent; nothing else is ever replaced.
    """
    out = Path(out)
    if not exists(out) or (out.is_dir() and not any(out.iterdir())):
        return
    ours = out.is_dir() and exists(out / MANIFEST) and _format(out / MANIFEST) == FORMAT
    if not ours:
        raise ConfigError(f"out={out}: is there already and is no exported agent; choose another folder")
    if not overwrite:
        raise ConfigError(f"out={out}: holds an exported agent; give overwrite=true or another folder")


def _format(path: Path) -> Any:
    content = read_json(path)
    return content.get("format") if isinstance(content, dict) else None


def export(
    agent: SpeculativeAgent,
    out: str | Path,
    observe: Observe,
    *,
    task: str | None,
    about: Mapping[str, Any] | None = None,
    steps: int = 60,
    seed: int = 0,
    overwrite: bool = False,
) -> Exported:
    """Write the agent to the folder `out`, whole or not at all, and compare it with the PyTorch agent.

    Args:
        agent: with one row, on the CPU, planning in float32 and not compiled; its state is lost.
        out: see `check_out`.
        observe: runs episodes to record, see `Observe`.
        task: its name; None: unknown.
        about: further entries of the manifest.
        steps: to record, of three pieces: an episode, a jump to another state in it, and a new episode.
        seed: of the recorded noise and episodes.
        overwrite: see `check_out`.

    Raises:
        ConfigError: a package is missing, `out` is something else, or ONNX cannot hold a part of the agent.
        FileError: the folder cannot be written.
    """
    check_packages()
    check_out(out, overwrite)
    graphs = _graphs(agent)
    with atomic_folder(out, replace=overwrite) as folder:
        for name, graph in graphs.items():
            _write(graph, folder / name)
        described = {name: graph.described() for name, graph in graphs.items()}
        manifest = _manifest(agent, task, described, dict(about or {}))
        shutil.copyfile(Path(__file__).with_name("export_run.py"), folder / PROGRAM)
        write_json(folder / MANIFEST, manifest)
        program = imported(folder / PROGRAM)
        for attempt in range(TRIES):
            recorded = record(agent, observe, steps, seed + 1000 * attempt)
            np.savez_compressed(folder / CHECK, **recorded)  # type: ignore[arg-type]
            difference = program.check(folder)
            if difference <= TOLERANCE:
                break
            # Where two samples are nearly equally good, rounding decides between them: rare, and no fault.
        else:
            raise ConfigError(
                f"the exported agent acts differently, by {difference:.1e}: nothing was written; report it"
            )
        sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.is_file()}
        sizes.pop(MANIFEST)
        write_json(folder / MANIFEST, manifest | {"bytes": sizes})
        shutil.rmtree(folder / "__pycache__", ignore_errors=True)
    return Exported(sizes, difference, len(recorded["action"]), int(recorded["planned"].sum()))


def record(agent: SpeculativeAgent, observe: Observe, steps: int, seed: int) -> dict[str, np.ndarray]:
    """Steps of an agent with the noise of its plans, the content of `check.npz`.

    Returns:
        `obs` `[T, *obs_shape]`, `action` `[T, A]`, `begins` `[T]` bool (an episode begins), `planned` `[T]`
        bool, and for `P` plans the noise inputs of the graphs: `prior_noise` `[P, H, n, A]`, `noise`
        `[P, I, H, N - n, A]`, `value_noise` `[P, I, N, A]`, `heads` `[P, I, 2]`, `gumbel` `[P, E]`.
    """
    planner, model = agent.teacher.planner, agent.teacher.model.config
    before, noise = planner.noise, _Recording(seed)
    planner.noise = noise
    rows: list[tuple[np.ndarray, np.ndarray, bool, bool]] = []
    begins, most = False, 0  # plans

    def act(obs: np.ndarray) -> np.ndarray:
        nonlocal begins
        if len(noise.gumbels) >= most:
            raise _Enough
        plans = len(noise.gumbels)
        action = agent.act(obs)
        rows.append((np.array(obs), action[: _used(agent)], begins, len(noise.gumbels) > plans))
        begins = False
        return action

    try:
        for piece in range(3):
            if piece != 1:  # the second piece is a jump in an episode: the plan no longer fits
                agent.reset()
                begins = True
            most += PLANS // 3
            with suppress(_Enough):
                observe(seed + piece, -(-steps // 3), act)
    finally:
        planner.noise = before
        agent.reset()
    c, a = planner.config, model.action_dim
    obs, action, first, planned = (np.array(x) for x in zip(*rows, strict=True))
    found = {"obs": obs, "action": action, "begins": first, "planned": planned}
    if not agent.plan_length:
        return found
    p, i, n = len(noise.gumbels), c.iterations, c.num_pi_trajs
    every = 1 + 2 * i  # draws of a plan from the normal distribution
    normals = [noise.normals[k::every] for k in range(every)]

    def stacked(draws: Sequence[Sequence[Tensor]], *shape: int) -> np.ndarray:
        """`draws` `[I][P]` as an array of `shape`."""
        return torch.stack([torch.stack([*d]) for d in draws], 1).reshape(shape).numpy()

    return found | {
        "prior_noise": stacked(normals[:1], p, c.horizon, n, a),
        "noise": stacked(normals[1::2], p, i, c.horizon, c.num_samples - n, a),
        "value_noise": stacked(normals[2::2], p, i, c.num_samples, a),
        "heads": torch.stack(noise.heads).reshape(p, i, 2).int().numpy(),
        "gumbel": torch.stack(noise.gumbels).reshape(p, c.num_elites).numpy(),
    }


class _Enough(Exception):
    """Enough plans of a piece are recorded."""


class _Recording(NoiseSource):
    """A source that keeps what it draws."""

    def __init__(self, seed: int):
        super().__init__(seed)
        self.normals: list[Tensor] = []
        self.heads: list[Tensor] = []
        self.gumbels: list[Tensor] = []

    def normal(self, *shape: int) -> Tensor:
        self.normals.append(super().normal(*shape))
        return self.normals[-1]

    def gumbel(self, *shape: int) -> Tensor:
        self.gumbels.append(super().gumbel(*shape))
        return self.gumbels[-1]

    def two_heads(self, num_q: int) -> Tensor:
        self.heads.append(super().two_heads(num_q))
        return self.heads[-1]


def _used(agent: SpeculativeAgent) -> int:
    """Action entries that the task uses; the others of a multi-task model are padding."""
    model, task = agent.teacher.model, agent.teacher.task
    return model.config.action_dim if task is None else model.config.action_dims[int(task[0])]


def _graphs(agent: SpeculativeAgent) -> dict[str, Graph]:
    """The graphs of an agent by file."""
    graphs = {"step.onnx": step_graph(agent)}
    if agent.plan_length:
        if agent.teacher.planner.config.num_pi_trajs:
            graphs["prior.onnx"] = prior_graph(agent)
        graphs["iteration.onnx"] = iteration_graph(agent)
    return graphs


def step_graph(agent: SpeculativeAgent) -> Graph:
    """One control step: `ControlStep` for one row that takes a plan at once or none."""
    c, horizon = agent.teacher.model.config, agent.teacher.planner.config.horizon
    control, task, used = ControlStep(agent.step, agent.monitor).eval(), agent.teacher.task, _used(agent)
    plan = torch.zeros(horizon, c.action_dim)
    state = [
        Port("z_pred", "the latent predicted for this step", torch.zeros(c.latent_dim), {"initial": 0}),
        Port(
            "k",
            "step in plan; a plan is due from the execution horizon on",
            torch.tensor(agent.config.execution_horizon, dtype=torch.int32),
            {"initial": agent.config.execution_horizon},
        ),
    ]
    inputs = [
        Port(
            "obs",
            "the observation",
            torch.zeros(c.obs_shape, dtype=torch.uint8 if c.pixels else torch.float32),
        ),
        Port("new", "a new plan is here; its first action is executed", torch.tensor(False)),
    ]
    if agent.plan_length:
        inputs.append(Port("new_plan", "the new plan, if there is one", plan))
        state.append(Port("plan", "the plan that is executed", plan, {"initial": 0}))
    none = None if agent.corrector is None else agent.corrector.no_history(1)
    window = none is not None and none.steps.shape[1] > 1  # a window of one step needs no history
    if none is not None and window:
        state.append(
            Port("history", "embeddings of the last steps, newest last", none.steps[0], {"initial": 0})
        )
        state.append(
            Port("history_valid", "which of them are of this episode", none.valid[0], {"initial": 0})
        )

    def run(*given: Tensor) -> tuple[Tensor, ...]:
        x = {port.name: value[None] for port, value in zip([*inputs, *state], given, strict=True)}
        history = History(x["history"], x["history_valid"]) if window else none
        own = x.get("plan", plan[None])
        now = PlanState(x["z_pred"], x["z_pred"], own, x["k"].long(), history, task)
        done = control(x["obs"], now, Arrival(x["new"], x.get("new_plan", plan[None])))
        after = done.then(now)
        then = {"z_pred": after.z_pred, "k": after.k.int(), "plan": after.plan}
        if after.history is not None:
            then |= {"history": after.history.steps, "history_valid": after.history.valid}
        results = [done.action[:, :used], done.z, done.measured, done.given_up]
        return tuple(value[0] for value in [*results, *(then[port.name] for port in state)])

    outputs = {
        "action": "the action to execute, in [-1, 1]",
        "z": "the latent of the observation; plans start here",
        "mismatch": "the distance of the real and the predicted latent; no meaning where a plan is due",
        "given_up": "the mismatch is too large: make a plan from z, and call again with it",
    }
    return Graph(
        run, inputs + state, outputs | {f"next_{p.name}": f"{p.name} of the next step" for p in state}
    )


def prior_graph(agent: SpeculativeAgent) -> Graph:
    """The planner's samples that follow the policy prior."""
    model, task, p = agent.teacher.model, agent.teacher.task, agent.teacher.planner.config
    shape = (p.horizon, p.num_pi_trajs, model.config.action_dim)

    def run(z: Tensor, noise: Tensor) -> tuple[Tensor, ...]:
        return (prior_trajectories(model, z[None], noise[:, None], task)[0],)

    inputs = [
        Port("z", "the latent to plan from", torch.zeros(model.config.latent_dim)),
        Port("prior_noise", "standard normal", torch.zeros(shape)),
    ]
    return Graph(run, inputs, {"prior": "action sequences that follow the policy prior"})


def iteration_graph(agent: SpeculativeAgent) -> Graph:
    """One iteration of the planner."""
    planner, task = agent.teacher.planner, agent.teacher.task
    model, p = planner.model, planner.config
    c, others = model.config, p.num_samples - p.num_pi_trajs
    iteration = Iteration(p, FastModel(c, planner.discount, torch.float32))
    weights = copy_weights(model, torch.float32)
    plan = torch.zeros(p.horizon, c.action_dim)
    inputs = [
        Port("z", "the latent to plan from", torch.zeros(c.latent_dim)),
        Port("mean", "of the distribution of plans", plan),
        Port("std", "of the distribution of plans", torch.full_like(plan, p.max_std)),
        Port("noise", "standard normal", torch.zeros(p.horizon, others, c.action_dim)),
        Port("value_noise", "standard normal", torch.zeros(p.num_samples, c.action_dim)),
    ]
    if p.num_pi_trajs:
        prior = torch.zeros(p.horizon, p.num_pi_trajs, c.action_dim)
        inputs.append(Port("prior", "from prior.onnx", prior))
    if c.num_q > 2:
        heads = torch.arange(2, dtype=torch.int32)
        inputs.append(Port("heads", f"two different Q heads of {c.num_q}", heads))

    def run(*given: Tensor) -> tuple[Tensor, ...]:
        x = {port.name: value for port, value in zip(inputs, given, strict=True)}
        batch = {name: value[None] for name, value in x.items()}
        found = iteration(
            origin(model, batch["z"], task),
            batch.get("prior", plan.new_zeros(1, p.horizon, 0, c.action_dim)),
            batch["mean"][:, :, None],
            batch["std"][:, :, None],
            batch["noise"],
            batch["value_noise"],
            heads=x["heads"].long() if "heads" in x else torch.arange(2),
            w=weights,
        )
        return found.mean[0, :, 0], found.std[0, :, 0], found.elites[0], found.score[0]

    outputs = {
        "next_mean": "of the distribution, refitted to the elites",
        "next_std": "of the distribution, refitted to the elites",
        "elites": "the best samples, best first",
        "score": "their weights; they sum to one",
    }
    return Graph(run, inputs, outputs)


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter warns of its own code, and of packages that are not needed."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    with warnings.catch_warnings(action="ignore"):
        try:
            yield
        finally:
            logging.disable(disabled)


def _write(graph: Graph, path: Path) -> None:
    """Write a graph as one file.

    Raises:
        ConfigError: ONNX cannot hold it.
    """
    # Copies: the exporter takes inputs that are one tensor for one input.
    args = tuple(port.value.clone() for port in graph.inputs)
    with _quiet(), torch.no_grad():
        try:
            program = torch.onnx.export(
                Function(graph.run).eval(),
                args,
                dynamo=True,
                opset_version=OPSET,
                optimize=True,
                verbose=False,
                input_names=[port.name for port in graph.inputs],
                output_names=[*graph.outputs],
            )
        except Exception as e:  # the exporter raises many types
            raise ConfigError(
                f"{path.name} cannot be made ({' '.join(str(e).split()):.120}): ONNX cannot hold a part of "
                "this agent; its teacher alone may still be exported"
            ) from e
        assert program is not None
        own = {*program.model.graph.inputs, *program.model.graph.outputs}
        for node in program.model.graph.all_nodes():  # the exporter's own names can be the same as ours
            for value in node.outputs:
                if value not in own:
                    value.name = f"_{value.name}"
        program.save(str(path), external_data=False)


def imported(path: Path) -> ModuleType:
    """A Python file, imported under a name of its own."""
    spec = importlib.util.spec_from_file_location("tdmpc2_exported_run", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _manifest(
    agent: SpeculativeAgent, task: str | None, graphs: Mapping[str, Any], about: dict[str, Any]
) -> dict[str, Any]:
    """What a program needs to know of the graphs, and where they come from."""
    model, planner = agent.teacher.model, agent.teacher.planner
    c = model.config
    return {
        "format": FORMAT,
        "task": task,
        "mode": agent.config.in_words(),
        "execution_horizon": agent.config.execution_horizon,
        "plans": agent.plan_length > 0,
        "observation": {
            "shape": list(c.obs_shape),
            "dtype": "uint8" if c.pixels else "float32",
            "order": "as in training: for dm_control the task's own order of entries, not sorted by name",
            "scaling": "none" if not c.pixels else "pixels 0 to 255, the last three frames, oldest first",
        },
        "action": {
            "size": _used(agent),
            "scaling": "each entry in [-1, 1]; scale it linearly to the actuator's range",
            "repeat": "hold each action as long as in training; dm_control: 2 control steps",
        },
        "planner": asdict(planner.config),
        "num_q": c.num_q,
        "discount": planner.discount,
        "speculation": asdict(agent.config),
        "graphs": dict(graphs),
        "weights": fingerprint(model),
        "versions": {name: version(name) for name in ("torch", *PACKAGES)} | {"opset": OPSET},
        "provenance": provenance(),
        **about,
    }
