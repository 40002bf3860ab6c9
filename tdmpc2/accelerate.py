"""The main job: a TD-MPC2 checkpoint and a task in, an accelerated agent and the evidence for it out.

    OUT/settings.json       what was asked for; a run goes on only with the same
    OUT/data/               shards: the teacher's own episodes, then those of each round
    OUT/rounds/N/           correctors trained on what there was before round N
    OUT/correctors/         the final ones
    OUT/evaluation/         raw results, summary and report
    OUT/config.json, model.safetensors     the agent that `tdmpc2.load_agent(OUT)` opens

Correctors fail by leaving the states that they were trained on. So data is collected in rounds: under the
current correctors, every state labelled by the teacher, added to what there is (DAgger, Ross et al. 2011).
A run that is killed goes on where it stopped, for each step leaves whole files and is not done twice.
"""

from dataclasses import asdict, dataclass
from pathlib import Path

import gymnasium as gym
from rich.console import Console

from .agent import TDMPC2, load_teacher
from .cli import provenance
from .config import BudgetOverride, SpeculationConfig, discount_of
from .corrector import ARCHITECTURES, BaseCorrector, load_corrector, read_header
from .distillation import CorrectorTrainConfig, collect, load_shards, train_corrector
from .envs import make_env, max_episode_steps
from .errors import CheckpointError, ConfigError
from .evaluation.evaluate import EvaluationConfig, Subject, evaluate
from .evaluation.modes import EXECUTION_HORIZONS
from .files import read_json, write_json
from .world_model import fingerprint, save_world_model


@dataclass(frozen=True, kw_only=True)
class AccelerateConfig(BudgetOverride, EvaluationConfig, CorrectorTrainConfig):
    """Everything that `scripts/accelerate.py` can be told."""

    task: str
    checkpoint: str  # an original .pt file or a folder of ours
    out: str = ""  # default: accelerated/<task>
    task_index: int | None = None  # of a multi-task model
    device: str = "cpu"
    episodes: int = 8  # of the teacher
    rounds: int = 3  # of data under the correctors
    round_episodes: int = 8
    collect_seed: int = 0  # of the first episode of all


def open_teacher(
    task: str,
    checkpoint: str,
    budget: BudgetOverride,
    *,
    device: str = "cpu",
    task_index: int | None = None,
) -> tuple[TDMPC2, gym.Env]:
    """The teacher of a checkpoint with its budget for a task, and an environment of that task.

    Raises:
        CheckpointError: the checkpoint cannot be used, or was made for other observations or actions.
        TaskError: there is no such task.
    """
    teacher = load_teacher(checkpoint, device=device, task=task_index)
    config = teacher.model.config
    env = make_env(task, obs="rgb" if config.pixels else "state")
    shapes = (env.observation_space.shape, env.action_space.shape)
    if shapes != (config.obs_shape, (config.action_dim,)):
        raise CheckpointError(
            f"{checkpoint} was made for observations {config.obs_shape} and actions "
            f"{(config.action_dim,)}, {task} has {shapes[0]} and {shapes[1]}: it is of another task"
        )
    planner = budget.apply(teacher.planner.config)
    discount = discount_of(max_episode_steps(env))
    return TDMPC2(teacher.model, planner, discount=discount, task=task_index), env


def accelerate(config: AccelerateConfig, console: Console) -> Path:
    """Collect, train both correctors, calibrate, choose, evaluate, report; returns the agent's folder.

    Raises:
        ConfigError: the folder holds a run with other settings, or seeds overlap.
        CheckpointError, DataError, TaskError: what was given cannot be used.
    """
    c = config
    out = Path(c.out or f"accelerated/{c.task}")
    collected = range(c.collect_seed, c.collect_seed + c.episodes + c.rounds * c.round_episodes)
    if set(collected) & (set(c.calibration_seeds) | set(c.eval_seeds)):
        raise ConfigError("collection seeds overlap those of calibration or evaluation")
    teacher, env = open_teacher(
        c.task, c.checkpoint, c, device=c.device, task_index=c.task_index
    )
    name = fingerprint(teacher.model)
    settings = {**asdict(c), "teacher": name}
    if (out / "settings.json").exists() and read_json(out / "settings.json") != settings:
        raise ConfigError(f"{out} holds a run with other settings: choose another out=, or delete it")
    write_json(out / "settings.json", settings)

    def gather(folder: str, first: int, episodes: int, behaviours, correctors) -> None:
        collect(
            teacher,
            c.task,
            lambda: make_env(c.task, obs="rgb" if teacher.model.config.pixels else "state"),
            out / "data" / folder,
            episodes=episodes,
            seed=first,
            num_envs=c.num_envs,
            behaviours=behaviours,
            correctors=correctors,
        )

    def train(folder: Path) -> dict[str, BaseCorrector]:
        if not (folder / "done.json").exists():
            trained = train_corrector(teacher.model, load_shards(out / "data", name), c, folder)
            write_json(folder / "done.json", {n: t.validation._asdict() for n, t in trained.items()})
        return {n: load_corrector(folder / n, name, c.device) for n in read_json(folder / "done.json")}

    console.print(f"[bold]{c.task}[/]: the teacher's own episodes")
    gather("teacher", c.collect_seed, c.episodes, [SpeculationConfig(execution_horizon=1)], None)
    for r in range(c.rounds):
        console.print(f"round {r + 1} of {c.rounds}: episodes under the correctors so far")
        correctors = train(out / "rounds" / str(r + 1))
        behaviours = [
            SpeculationConfig(execution_horizon=horizon, corrector=n)
            for horizon in EXECUTION_HORIZONS[::-1]
            for n in correctors
        ]
        first = c.collect_seed + c.episodes + r * c.round_episodes
        gather(f"round-{r + 1}", first, c.round_episodes, behaviours, correctors)
    console.print("the final correctors")
    train(out / "correctors")
    env.close()
    evaluate_correctors(
        c.task, c.checkpoint, out / "correctors", out / "evaluation", c, c, console, c.device, c.task_index
    )
    save_world_model(
        out,
        teacher.model,
        task=c.task,
        discount=teacher.planner.discount,
        planner=asdict(teacher.planner.config),
        speculation=read_json(out / "evaluation" / "chosen.json")["speculation"],
        provenance=provenance(),
    )
    console.print(f'done: agent = tdmpc2.load_agent("{out}")')
    return out


def evaluate_correctors(
    task: str,
    checkpoint: str,
    correctors: Path,
    out: Path,
    budget: BudgetOverride,
    config: EvaluationConfig,
    console: Console,
    device: str = "cpu",
    task_index: int | None = None,
) -> str:
    """Evaluate a folder of correctors in every mode into `out`; returns the chosen mode's name.

    Raises:
        CheckpointError: there is no corrector, or one is of another teacher.
    """
    teacher, env = open_teacher(task, checkpoint, budget, device=device, task_index=task_index)
    env.close()
    name = fingerprint(teacher.model)
    found = [a for a in ARCHITECTURES if (correctors / a).is_dir()]
    if not found:
        raise CheckpointError(f"no corrector in {correctors}: train one with scripts/train_corrector.py")
    networks = {a: load_corrector(correctors / a, name, device) for a in found}
    validation = []
    for a in found:
        errors = read_header(correctors / a)["validation"]
        means = {key: sum(values) / len(values) for key, values in errors.items()}
        validation.append(
            {
                "corrector": a,
                "error": means["corrector"],
                "plan_error": means["plan"],
                "prior_error": means["prior"],
            }
        )
    planner = teacher.planner
    subject = Subject(task, teacher.model, planner.config, planner.discount, networks, task_index)
    return evaluate(subject, config, out, {**provenance(), "validation": validation}, console)
