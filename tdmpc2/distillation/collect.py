"""Collecting corrector data: agents act, the teacher plans at every state, shards come out.

A shard is a batch of `num_envs` episodes. It is a pure function of the teacher, its budget, the seeds and the
behaviours. A killed run continues with the missing shards, and leaves the same files as an uninterrupted run.

Each state costs one planner call: that plan is the label, warm-started by the last label's mean,
and also what an agent executes when a replan is due. Replanning at every step, the default, gives
the teacher's own episodes; other behaviours visit the states of a speculative agent. Bursts of random actions
act like pushes: the labels then show how to recover.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor

from ..agent import SpeculativeAgent
from ..config import TEACHER, SpeculationConfig
from ..corrector import BaseCorrector
from ..envs import max_episode_steps
from ..errors import ConfigError, DataError
from ..files import difference, in_use
from ..planner import Plan
from ..teacher import Teacher
from ..workers import HERE, Workers
from ..world_model.checkpoint import fingerprint
from .dataset import read_shard, write_shard

TRUNCATED, TERMINATED = 1, 2
BURST_EVERY = 100  # agent steps from one burst to the next, on average
BURST_STEPS = 8  # agent steps that a burst lasts, at most


def collect(
    teacher: Teacher,
    out: str | Path,
    *,
    episodes: int,
    seed: int = 0,
    num_envs: int = 8,
    behaviours: Sequence[SpeculationConfig] = (TEACHER,),
    correctors: Mapping[str, BaseCorrector] | None = None,
    bursts: bool = False,
    workers: Workers = HERE,
) -> list[Path]:
    """Collect episodes with the seeds `seed ... seed + episodes - 1` and return their shards.

    Args:
        teacher: who labels, on its task.
        out: folder of the shards; those that it holds already are not collected again.
        episodes: number of episodes.
        seed: of the first episode.
        num_envs: episodes that run at once, which make one shard.
        behaviours: who acts; the episodes take them in turn.
        correctors: those that behaviours name.
        bursts: whether random actions are executed now and then.
        workers: collect the shards that are missing.

    Raises:
        ConfigError: a number is not positive, a behaviour names a corrector that is not there, or another
            process is at work in `out`.
        DataError: `out` holds a shard of these seeds that is damaged or was collected otherwise.
        FileError: `out` cannot be written.
    """
    correctors = correctors or {}
    if min(episodes, num_envs, len(behaviours)) < 1 or seed < 0:
        raise ConfigError(
            "episodes, num_envs and the number of behaviours must be positive, and seed at least 0"
        )
    for behaviour in behaviours:
        if behaviour.corrector and behaviour.corrector not in correctors:
            raise ConfigError(f"corrector={behaviour.corrector!r}: there is no such corrector here")
    header = {
        "task": teacher.task,
        "task_index": teacher.task_index,
        "teacher": teacher.fingerprint,
        "planner": asdict(teacher.planner),
        "discount": teacher.discount,
        "behaviours": [_describe(b, correctors) for b in behaviours],
        "bursts": bursts,
    }
    paths: list[Path] = []
    missing: dict[str, tuple[Any, ...]] = {}
    episodes_missing = 0
    with in_use(out):
        for first in range(seed, seed + episodes, num_envs):
            seeds = list(range(first, min(first + num_envs, seed + episodes)))
            path = Path(out) / f"shard-{first:08d}.safetensors"
            paths.append(path)
            expected = {**header, "seeds": seeds}
            if path.exists():
                _check(path, expected)
            else:
                turn = (first - seed) % len(behaviours)
                own = [*behaviours[turn:], *behaviours[:turn]][: len(seeds)]
                named = {b.corrector: correctors[b.corrector] for b in own if b.corrector}
                missing[path.name] = path, expected, teacher, own, named
                episodes_missing += len(seeds)
        if missing:
            with closing(teacher.env()) as env:
                total = episodes_missing * max_episode_steps(env)
            for _ in workers.map("collecting", _collect, missing, task=teacher.task, total=total):
                pass
    return paths


def _collect(
    path: Path,
    header: Mapping[str, Any],
    teacher: Teacher,
    behaviours: Sequence[SpeculationConfig],
    correctors: Mapping[str, BaseCorrector],
    advance: Callable[[float], None],
) -> None:
    """Write one shard.

    Args:
        path: of the shard.
        header: of the shard, with its seeds.
        teacher: who labels.
        behaviours: of the shard's episodes, in turn.
        correctors: those that behaviours name.
        advance: called after each step with the number of episodes that were running.
    """
    with ExitStack() as stack:
        envs = [stack.enter_context(closing(teacher.env())) for _ in header["seeds"]]
        tensors = _run(teacher, envs, header["seeds"], behaviours, correctors, header["bursts"], advance)
    write_shard(path, tensors, header)


def _run(
    teacher: Teacher,
    envs: Sequence[gym.Env],
    seeds: Sequence[int],
    behaviours: Sequence[SpeculationConfig],
    correctors: Mapping[str, BaseCorrector],
    bursts: bool,
    advance: Callable[[float], None],
) -> dict[str, Tensor]:
    """The tensors of one shard; rows whose episode has ended idle until the last one ends."""
    n = len(seeds)
    labeller = teacher.agent(n, seeds[0])
    groups = []  # agents and the rows that they act for
    for i, behaviour in enumerate(behaviours):
        rows = torch.arange(i, n, len(behaviours))
        corrector = correctors[behaviour.corrector] if behaviour.corrector else None
        agent = SpeculativeAgent(teacher.agent(len(rows), seeds[0]), behaviour, corrector)
        agent.reset()
        groups.append((rows, agent))
    obs = np.stack([env.reset(seed=s)[0] for env, s in zip(envs, seeds, strict=True)])
    action = torch.zeros(n, teacher.model.config.action_dim)
    disturb = [Bursts(s) for s in seeds] if bursts else []
    recorded: list[list[dict[str, Tensor]]] = [[] for _ in range(n)]
    running = np.ones(n, dtype=bool)
    while running.any():
        z = labeller.encode(obs)
        plan = labeller.plan(z)
        seen = torch.from_numpy(obs.copy())
        for rows, agent in groups:
            action[rows] = agent.act(seen[rows], Plan(*(x[rows] for x in plan))).cpu()
        for row, burst in enumerate(disturb):
            action[row] = burst(action[row])
        batch = {
            "latent": z,
            "plan": plan.mean,
            "drawn": plan.actions[:, 0],
            "action": action.clone(),
        }
        batch = {name: x.cpu() for name, x in batch.items()}
        acting = np.flatnonzero(running).tolist()
        for i in acting:
            obs[i], reward, terminated, truncated, _ = envs[i].step(action[i].numpy())
            end = TERMINATED if terminated else TRUNCATED if truncated else 0
            step = {name: x[i] for name, x in batch.items()}
            step["reward"] = torch.tensor(reward, dtype=torch.float32)
            step["episode_end"] = torch.tensor(end, dtype=torch.uint8)
            recorded[i].append(step)
            running[i] = not end
        advance(len(acting))
    steps = [step for episode in recorded for step in episode]
    return {name: torch.stack([step[name] for step in steps]) for name in steps[0]}


class Bursts:
    """Random actions instead of an episode's own, for a few steps now and then, as its seed has it."""

    def __init__(self, seed: int):
        self._rng = np.random.default_rng([seed, 2])
        self._left = 0  # steps that the running burst still lasts

    def __call__(self, action: Tensor) -> Tensor:
        begins, steps = self._rng.random() < 1 / BURST_EVERY, int(self._rng.integers(1, BURST_STEPS + 1))
        noise = torch.from_numpy(self._rng.uniform(-1, 1, len(action))).float()
        self._left = steps if begins else max(self._left - 1, 0)
        return noise if self._left else action


def _describe(behaviour: SpeculationConfig, correctors: Mapping[str, BaseCorrector]) -> dict[str, Any]:
    """A behaviour in JSON, with the weights of its corrector by fingerprint."""
    named = behaviour.corrector
    return {**asdict(behaviour), "weights": fingerprint(correctors[named]) if named else ""}


def _check(path: Path, expected: Mapping[str, Any]) -> None:
    """Raise DataError where a shard was collected otherwise."""
    _, header = read_shard(path)
    if differs := difference({name: header[name] for name in expected}, expected):
        raise DataError(f"{path} was collected with {differs}: choose another folder or delete it")
