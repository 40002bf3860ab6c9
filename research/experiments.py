"""What each ingredient of corrected execution is worth, on the data of an accelerated agent.

    python research/experiments.py agent=accelerated/walker-walk

Every experiment changes one thing. A corrector executes 24 steps a plan, refined. It is trained anew from the
agent's data where training is what changes; elsewhere it is the agent's own. It falls back in the experiment
on acceptance only. The worlds are the one as modelled and one with pushes, in that experiment also one where
everything is much heavier. The seeds are neither those of calibration nor those of the results. Writes
`results/experiments/TASK.csv`, a row an episode, and `TASK.json`, where the numbers come from. A run that is
killed goes on with the variants that are missing.
"""

import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import pandas as pd
import torch
from torch import Tensor, nn

from tdmpc2 import SpeculativeAgent, WorldModel, cli
from tdmpc2.config import TEACHER, BudgetOverride, CorrectorConfig, SpeculationConfig
from tdmpc2.corrector import (
    ARCHITECTURES,
    BaseCorrector,
    TwoTowerCorrector,
    build_corrector,
    load_corrector,
)
from tdmpc2.distillation import CorrectorTrainConfig, Recording, collect, load_shards, train_corrector
from tdmpc2.distillation.dataset import split_starts
from tdmpc2.distillation.losses import l1_distance, unroll
from tdmpc2.errors import ConfigError
from tdmpc2.evaluation.choose import PUSH
from tdmpc2.evaluation.config import EvaluationConfig
from tdmpc2.evaluation.modes import ALONE, BASELINE, DISTILLED, PRIOR
from tdmpc2.evaluation.rollout import Rollout, rollout
from tdmpc2.files import atomic_write, difference, in_order, read_json, write_json
from tdmpc2.monitor import Monitor, calibrate_thresholds
from tdmpc2.planner import Plan
from tdmpc2.provenance import provenance
from tdmpc2.step import PlanState, PlanStep
from tdmpc2.teacher import Teacher, open_teacher
from tdmpc2.world_model.checkpoint import read_config
from tdmpc2.world_model.layers import NormedLinear, mlp

LONG = 24  # steps a plan
UNROLLED = (6, 12)  # beside the default
QUANTILES = (EvaluationConfig.quantile, 0.97)
LOSS_WORDS = {"mse": "squared distance", "l1": "L1 distance"}
HEAD_UPDATES = 500  # in training the estimate of a corrector's own error
DRAWS = 2  # plans that a label is the mean of
HEAVY = ("mass", 1.6)
STANDARD = "mismatch"  # thresholds for every step in plan, one rate of false alarms a plan
PER_STEP = "mismatch, one rate of false alarms a step"
ONE_FOR_ALL = "mismatch, one threshold for all steps"
BUDGETS = (1, 2)  # iterations of MPPI, where the baseline's plans are made cheaper instead of fewer
EXTENSIONS = {  # steps taken from a plan before the prior extends it, and the horizon that it is made with
    "1 planned step, then the prior": (1, None),
    "3 planned steps, then the prior": (3, None),
    "6 planned steps, then the prior": (6, 6),
}
AS_IT_IS = {  # of each experiment the variant that the package has; of the others that of `as it is`
    "executed": "the mean, 3 steps",
    "refinement": "of the corrected action",
    "bursts": "of random actions",
    "plan": "3 planned steps, then the prior",
    "acceptance": f"{STANDARD}, quantile {EvaluationConfig.quantile}",
}


@dataclass(frozen=True, kw_only=True)
class ExperimentConfig:
    """Which agent the experiments are made on, and how correctors are trained."""

    agent: str  # a folder that `tdmpc2 accelerate` made
    task: str = ""  # default: the agent's; name one of your own, module:EnvId, for a folder imports no module
    round_episodes: int = 8  # collected for the experiment on bursts
    round_seed: int = 30_000
    out: str = "results/experiments"
    planner: BudgetOverride = field(default_factory=BudgetOverride)
    distillation: CorrectorTrainConfig = field(
        default_factory=lambda: CorrectorTrainConfig(architecture="two_tower")
    )
    evaluation: EvaluationConfig = field(default_factory=lambda: EvaluationConfig(seed=40_000))


class Mean(SpeculativeAgent):
    """Executes the mean of every plan."""

    def followed(self, plan: Plan, drawn: Tensor) -> Tensor:
        return plan.mean


class Drawn(SpeculativeAgent):
    """Executes the elite that was drawn from every plan."""

    def followed(self, plan: Plan, drawn: Tensor) -> Tensor:
        return plan.actions


EXECUTED: Mapping[str, tuple[int, type[SpeculativeAgent]]] = {  # steps of each plan, without corrector
    "the mean, 1 step": (1, Mean),
    "the mean, 3 steps": (3, Mean),
    "the elite drawn, 3 steps": (3, Drawn),
}


class RelativeMismatch(Monitor):
    """Mismatch in units of how far the real latent has just moved."""

    before: Tensor | None = None
    latest: Tensor | None = None

    def measure(self, now: PlanState, step: PlanStep) -> Tensor:
        if self.latest is None or not torch.equal(now.z, self.latest):  # an agent may ask twice in a step
            self.before, self.latest = self.latest, now.z
        mismatch = super().measure(now, step)
        return mismatch if self.before is None else mismatch / ((now.z - self.before).norm(dim=-1) + 1e-3)


class ActionGap(Monitor):
    """How far the prior's actions at the real and the predicted latent are apart: what a mismatch changes."""

    def measure(self, now: PlanState, step: PlanStep) -> Tensor:
        real, predicted = (step.model.prior(z, now.task) for z in (now.z, now.z_pred))
        return (real - predicted).norm(dim=-1)


class ValueGap(Monitor):
    """By how much the Q heads prefer the policy prior's action to the one that would be executed."""

    def measure(self, now: PlanState, step: PlanStep) -> Tensor:
        model, own = step.model, step.corrected(now, step.planned(now))[0]
        prior = model.prior(now.z, now.task)
        preferred, other = (model.value(now.z, action, now.task).mean(0) for action in (prior, own))
        return preferred - other


class Judged(Monitor):
    """Accepts by what a network of its own says."""

    def __init__(self, threshold: tuple[float, ...] | None, judge: nn.Module):
        super().__init__(threshold)
        self.judge = judge


class Disagreement(Judged):
    """How far the action that would be executed is from that of `judge`, a corrector which sees one step."""

    def measure(self, now: PlanState, step: PlanStep) -> Tensor:
        assert isinstance(self.judge, BaseCorrector)
        planned = step.planned(now)
        seen = self.judge.embed(now.z, now.z_pred, planned, now.k)
        answer = self.judge(self.judge.no_history(len(planned)).then(seen), planned)
        return (step.corrected(now, planned)[0] - answer).norm(dim=-1)


class OwnError(Judged):
    """How far the corrector's action is from the teacher's, as `judge` (of `error_estimate`) has it."""

    def measure(self, now: PlanState, step: PlanStep) -> Tensor:
        history = step.corrected(now, step.planned(now))[1]
        assert step.corrector is not None and history is not None
        estimate: Tensor = self.judge(step.corrector.features(history))
        return estimate.squeeze(-1)


def untrained(config: CorrectorConfig) -> BaseCorrector:
    """A corrector that executes what was planned: of the policy prior alone, the prior's action."""
    return build_corrector(replace(config, architecture="two_tower")).eval().requires_grad_(False)


def error_estimate(
    model: WorldModel, corrector: BaseCorrector, data: Recording, config: CorrectorTrainConfig
) -> nn.Module:
    """A head, features `[B, F]` to `[B, 1]`: the L1 distance to the teacher's action to be expected.

    Trained on the segments that the corrector was trained on.
    """
    torch.manual_seed(config.seed)
    width, steps = corrector.own.in_features, config.rollout_steps
    head = mlp(width, [width], 1).to(data.latent.device)
    starts = split_starts(data, config.held_out_every).train
    optimizer = torch.optim.Adam(head.parameters(), config.lr)
    features: list[Tensor] = []
    hook = corrector.own.register_forward_pre_hook(lambda _, args: features.append(args[0]))
    for _ in range(HEAD_UPDATES):
        start = starts[torch.randint(len(starts), (config.batch_size,))]
        earlier = torch.randint(1, steps + 2, start.shape, device=start.device)
        u = unroll(model, corrector, data, start, earlier, steps)  # last of all, it answers all steps at once
        missed = (head(features[-1]).squeeze(-1) - l1_distance(u.action, u.teacher).flatten()).square()
        features.clear()
        optimizer.zero_grad()
        (missed * u.inside.flatten()).mean().backward()
        optimizer.step()
    hook.remove()
    return head.requires_grad_(False)


class WithPrior(TwoTowerCorrector):
    """Sees the policy prior's action beside the real latent."""

    def __init__(self, config: CorrectorConfig, prior: Callable[[Tensor], Tensor]):
        super().__init__(config)
        self.real = NormedLinear(config.latent_dim + config.action_dim, config.width, nn.Mish())
        self.real.register_forward_pre_hook(lambda _, args: torch.cat([args[0], prior(args[0])], -1))


class Bench:
    """Runs modes of a teacher on the evaluation seeds, and keeps their episodes in a file.

    Args:
        teacher: plans.
        config: seeds and number of environments.
        path: of the episodes; those that it holds already are not run again.
    """

    def __init__(self, teacher: Teacher, config: EvaluationConfig, path: Path):
        self.teacher, self.config, self.path = teacher, config, path
        self.episodes = pd.read_csv(path, keep_default_na=False) if path.exists() else pd.DataFrame()

    def rollout(
        self,
        mode: SpeculationConfig,
        corrector: BaseCorrector | None = None,
        perturbation: tuple[str, float] | None = None,
        agent_type: type[SpeculativeAgent] = SpeculativeAgent,
        rule: Callable[..., Monitor] = Monitor,
        seeds: range | None = None,
        horizon: int | None = None,
    ) -> Rollout:
        """Episodes of a mode; `horizon` is of the plans, where it is not to be the teacher's."""
        seeds = seeds or self.config.seeds
        planner = self.teacher.planner
        planner = replace(planner, horizon=horizon or planner.horizon)
        teacher = replace(self.teacher, perturbation=perturbation, planner=planner)
        planning = teacher.agent(min(self.config.num_envs, len(seeds)), seeds[0])
        agent = agent_type(planning, mode, corrector, rule(mode.threshold))
        return rollout(agent, teacher.env, seeds)

    def add(
        self,
        experiment: str,
        variant: str,
        run: Callable[[tuple[str, float] | None], Rollout],
        perturbations: Sequence[tuple[str, float] | None] = (None, PUSH),
    ) -> None:
        """The episodes that `run` makes under each perturbation, unless they are there."""
        for perturbation in perturbations:
            words = "" if perturbation is None else f"{perturbation[0]} {perturbation[1]}"
            about = {"experiment": experiment, "variant": variant, "disturbance": words}
            if len(self.episodes) and (self.episodes[list(about)] == pd.Series(about)).all(axis=1).any():
                continue
            print(f"{experiment}: {variant} {words}", file=sys.stderr)
            own = run(perturbation).episodes[["seed", "return", "length", "planner_calls"]]
            self.episodes = pd.concat([self.episodes, own.assign(**about)], ignore_index=True)
            with atomic_write(self.path) as tmp:
                self.episodes.to_csv(tmp, index=False)


def main(config: ExperimentConfig) -> None:
    folder = Path(config.agent)
    saved = read_config(folder)
    teacher = open_teacher(config.task or None, str(folder), config.planner)
    data = load_shards(folder / "data", teacher.fingerprint)
    used = {*data.seed.tolist(), *range(config.round_seed, config.round_seed + config.round_episodes)}
    evaluation, architecture = config.evaluation, config.distillation.architecture
    if used & {*evaluation.seeds, *evaluation.calibration_seeds}:
        raise ConfigError("evaluation or calibration seeds overlap those of the agent's data: change them")
    corrector, distilled = (
        load_corrector(folder / "correctors" / name, teacher.fingerprint)
        for name in (architecture, DISTILLED)
    )
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    path, about = (out / f"{teacher.task}.{end}" for end in ("csv", "json"))
    running, running_about = (p.with_name(f"{p.name}.running") for p in (path, about))
    made_by = provenance()
    claim = {
        "agent": saved["provenance"],
        "settings": asdict(config),
        "commit": made_by["commit"],
        "as_it_is": AS_IT_IS,
    }
    begun = read_json(running_about) if running_about.exists() else None
    if begun is not None and difference({name: begun.get(name) for name in claim}, claim):
        raise ConfigError(
            f"{running} was begun with another agent, other settings or other code: delete both files"
        )
    write_json(running_about, {**made_by, **claim})
    bench = Bench(teacher, evaluation, running)
    bench.add(BASELINE, BASELINE, lambda d: bench.rollout(TEACHER, perturbation=d), (None, PUSH, HEAVY))

    for variant, (k, agent_type) in EXECUTED.items():
        bench.add(
            "executed", variant, partial(bench.rollout, SpeculationConfig(k), None, agent_type=agent_type)
        )

    for iterations in BUDGETS:
        cheaper = partial(bench.rollout, replace(TEACHER, iterations=iterations), None, agent_type=Mean)
        bench.add("budget", f"the mean of a new plan at every step, iterations: {iterations}", cheaper)

    free = SpeculationConfig(LONG, corrector=architecture, refine_steps=1)
    unrefined, far = (replace(free, refine_steps=n) for n in (0, teacher.planner.horizon))
    alone, prior = (replace(mode, refine_steps=1) for mode in (ALONE, PRIOR))
    refinements: Mapping[str, tuple[SpeculationConfig, BaseCorrector]] = {
        "none": (unrefined, corrector),
        "of the corrected action": (free, corrector),
        "of the corrected action, as many steps ahead as plans have": (far, corrector),
        "none, of the distilled policy alone": (ALONE, distilled),
        "of the distilled policy alone": (alone, distilled),
        "of the prior alone": (prior, untrained(corrector.config)),
    }
    for variant, (mode, network) in refinements.items():
        bench.add("refinement", variant, partial(bench.rollout, mode, network))

    def trained(experiment: str, variant: str, data: Recording, settings: CorrectorTrainConfig) -> None:
        @cache
        def new() -> BaseCorrector:
            with TemporaryDirectory() as out:
                return train_corrector(teacher.model, data, settings, out)[settings.architecture].corrector

        bench.add(experiment, variant, lambda d: bench.rollout(free, new(), d))

    training(data, folder, teacher, config.distillation, trained)
    for name, bursts in {"none": False, "of random actions": True}.items():
        own = with_a_round(folder, teacher, corrector, config, bursts)
        trained("bursts", name, own, config.distillation)
    for variant, (length, horizon) in EXTENSIONS.items():
        longer = partial(bench.rollout, replace(free, plan_length=length), corrector, horizon=horizon)
        bench.add("plan", variant, longer)
    head = error_estimate(teacher.model, corrector, data, config.distillation)
    rules: Mapping[str, Callable[..., Monitor]] = {
        STANDARD: Monitor,
        PER_STEP: Monitor,
        ONE_FOR_ALL: Monitor,
        "mismatch over last step": RelativeMismatch,
        "action gap": ActionGap,
        "value gap": ValueGap,
        "disagreement with the distilled policy": partial(Disagreement, judge=distilled),
        "estimate of the corrector's own error": partial(OwnError, judge=head),
    }

    for name, rule in rules.items():
        seen = bench.rollout(free, corrector, rule=rule, seeds=evaluation.calibration_seeds).steps
        for quantile in QUANTILES:
            mode = replace(free, threshold=thresholds(name, seen, quantile))
            run = partial(bench.rollout, mode, corrector, rule=rule)
            bench.add("acceptance", f"{name}, quantile {quantile}", run, (None, PUSH, HEAVY))
    running_about.rename(about)
    running.rename(path)


def thresholds(rule: str, steps: pd.DataFrame, quantile: float) -> tuple[float, ...]:
    """A rule's thresholds for the steps in plan 1, 2, ...; one that holds for all steps by `ONE_FOR_ALL`.

    Args:
        rule: its name.
        steps: columns `k, mismatch`, of calibration episodes without fallback.
        quantile: share of the plans that stay below throughout, by `PER_STEP` share of the steps.
    """
    if rule == STANDARD:
        return calibrate_thresholds(steps, quantile, LONG)
    seen = steps.loc[steps["k"] > 0, "mismatch"]
    plan, k = (steps["k"] == 0).cumsum(), steps["k"]
    if rule == ONE_FOR_ALL:
        return (float(seen.groupby(plan).max().quantile(quantile)),)
    level = quantile  # at every step in plan
    if rule != PER_STEP:  # by ranks: what other rules hold against thresholds may be negative
        level = seen.groupby(k).rank(pct=True).groupby(plan).max().quantile(quantile)
    return tuple(seen.groupby(k).quantile(level))


def training(
    data: Recording,
    folder: Path,
    teacher: Teacher,
    config: CorrectorTrainConfig,
    run: Callable[[str, str, Recording, CorrectorTrainConfig], None],
) -> None:
    """The experiments whose variants are trained: loss, input, unrolled steps, labels, amount of data."""
    as_it_is = (
        f"{LOSS_WORDS[config.loss]}, {config.rollout_steps} unrolled steps, labels are means, all episodes"
    )
    run("as it is", as_it_is, data, config)
    for loss, words in LOSS_WORDS.items():
        if loss != config.loss:
            run("loss", words, data, replace(config, loss=loss))
    prior = partial(teacher.model.prior, task=data.task)
    with patch.dict(ARCHITECTURES, {"two_tower": partial(WithPrior, prior=prior)}):
        run("input", "the prior's action too", data, replace(config, architecture="two_tower"))
    for steps in UNROLLED:
        run("unrolled steps", str(steps), data, replace(config, rollout_steps=steps))
    run("label", "the action drawn", data._replace(teacher_action=data.drawn), config)
    several = data._replace(teacher_action=mean_label(data, teacher))
    run("label", f"mean over {DRAWS} plans", several, config)
    shards = in_order(p for p in (folder / "data").iterdir() if p.is_dir())
    kept = torch.zeros(0, dtype=torch.long)
    for shard in sorted(shards, key=lambda p: p.name != "teacher")[:-1]:
        kept = torch.cat([kept, load_shards(shard, teacher.fingerprint).seed.unique()])
        run("data", f"up to {shard.name}: {len(kept)} episodes", episodes(data, kept), config)


def mean_label(data: Recording, teacher: Teacher) -> Tensor:
    """What a teacher answers along recorded episodes, the mean over several draws of its noise `[N, A]`."""
    first = data.first.unique()
    last = data.last[first]
    label = torch.zeros_like(data.teacher_action)
    for draw in range(DRAWS):
        agent = teacher.agent(len(first), seed=draw)
        for t in range(int((last - first).max()) + 1):
            rows = (first + t <= last).nonzero().squeeze(1)
            at = first[rows] + t
            label[at] += agent.plan(data.latent[at], rows).mean[:, 0] / DRAWS
    return label


def with_a_round(
    folder: Path, teacher: Teacher, corrector: BaseCorrector, config: ExperimentConfig, bursts: bool
) -> Recording:
    """The teacher's own episodes of an agent's data, and a round under its corrector made now."""
    architecture = config.distillation.architecture
    with TemporaryDirectory() as out:
        shutil.copytree(folder / "data" / "teacher", Path(out) / "teacher")
        collect(
            teacher,
            Path(out) / "round",
            episodes=config.round_episodes,
            seed=config.round_seed,
            num_envs=config.evaluation.num_envs,
            behaviours=[SpeculationConfig(LONG, corrector=architecture, refine_steps=1)],
            correctors={architecture: corrector},
            bursts=bursts,
        )
        return load_shards(out, teacher.fingerprint)


def episodes(data: Recording, seeds: Tensor) -> Recording:
    """The episodes of those seeds."""
    rows = torch.isin(data.seed, seeds).nonzero().squeeze(1)
    moved = rows.new_full((len(data.seed),), -1)
    moved[rows] = torch.arange(len(rows))
    columns = ("latent", "plan", "drawn", "teacher_action", "seed")
    return data._replace(
        **{name: getattr(data, name)[rows] for name in columns},
        first=moved[data.first[rows]],
        last=moved[data.last[rows]],
    )


if __name__ == "__main__":
    cli.run(ExperimentConfig, main)
