"""Training a corrector on sampled segments, with validation and test on held-out episodes.

The error is the mean L1 distance to the teacher's action over the steps after each plan's first. It is the
same for both training losses, so their errors can be compared. The validation error chooses the best weights.
The test error is reported with two references on the same steps: the uncorrected plan, and the policy prior
at the real latent. The best weights are saved after every validation; at the end the file's header gets the
errors.
"""

import csv
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from ..checked import Checked, at_least, within
from ..config import CorrectorConfig
from ..corrector import ARCHITECTURES, BaseCorrector, build_corrector, load_corrector, save_corrector
from ..errors import ConfigError, DataError, TDMPC2Error
from ..files import in_use
from ..progress import SILENT, Progress, Stage, Table
from ..world_model.model import WorldModel
from .dataset import Recording, split_starts
from .losses import LOSSES, Unrolled, correction_loss, distance, unroll

VALIDATION_STARTS = 256  # segments per validation


@dataclass(frozen=True)
class CorrectorTrainConfig(Checked):
    """How to train correctors."""

    architecture: str = "all"  # or one of two_tower, temporal, distilled
    seed: int = 0
    updates: int = 600  # at most
    batch_size: int = 32  # segments
    loss: str = "mse"  # distance to the teacher's action: mse (squared, as in the paper) or l1
    rollout_steps: int = 24  # corrected steps per segment
    rollout_coef: float = 1.0  # weight of the rollout loss; the distillation loss has weight 1
    residual_coef: float = 1e-3  # lambda: weight of ||delta_a||^2
    lr: float = 1e-3  # falls to zero along a cosine
    weight_decay: float = 1e-3
    validate_every: int = 100  # updates
    patience: int = 5  # validations without improvement before training stops
    held_out_every: int = 5  # one episode in so many is for validation, another for the test
    width: int = 256
    window: int = 8  # steps, of the temporal corrector
    num_layers: int = 2
    num_heads: int = 4

    @property
    def architectures(self) -> list[str]:
        """Those that are trained."""
        return list(ARCHITECTURES) if self.architecture == "all" else [self.architecture]

    def corrector(self, architecture: str, latent_dim: int, action_dim: int) -> CorrectorConfig:
        """The sizes of a corrector."""
        return CorrectorConfig(
            latent_dim=latent_dim,
            action_dim=action_dim,
            architecture=architecture,
            width=self.width,
            window=self.window,
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            max_k=self.rollout_steps + 1,  # a larger k uses the last embedding
        )

    def check_ranges(self) -> None:
        at_least(1, self, "updates", "batch_size", "rollout_steps", "validate_every", "patience")
        at_least(3, self, "held_out_every")
        at_least(0, self, "seed")
        within(self, 0, 1e12, "rollout_coef", "residual_coef", "weight_decay")
        within(self, 1e-12, 1, "lr")
        if self.loss not in LOSSES:
            raise ConfigError(f"loss={self.loss!r}: choose one of {', '.join(LOSSES)}")
        for name in self.architectures:
            build_corrector(self.corrector(name, latent_dim=8, action_dim=1))


class Errors(NamedTuple):
    """Mean L1 distance to the teacher's action on held-out episodes, for k = 1 ... S.

    `S` is `rollout_steps`, or less if the held-out episodes are shorter.
    """

    corrector: list[float]
    plan: list[float]
    prior: list[float]


class Trained(NamedTuple):
    corrector: BaseCorrector  # in evaluation mode
    errors: Errors  # on the test episodes


def train_corrector(
    model: WorldModel,
    data: Recording,
    config: CorrectorTrainConfig,
    out: str | Path,
    initial: Mapping[str, BaseCorrector] = MappingProxyType({}),
    progress: Progress = SILENT,
) -> dict[str, Trained]:
    """Train one corrector or all; returns them by architecture.

    Writes `corrector.safetensors` and `train.csv` in `out/ARCHITECTURE`.

    Args:
        model: the teacher's world model; `data` must belong to it and be on its device.
        data: from `load_shards`.
        config: how to train.
        out: folder; each architecture gets a subfolder.
        initial: correctors to continue from, by architecture; others start untrained.
        progress: shows the progress.

    Raises:
        ConfigError: there is no such architecture, a setting is invalid, or another process uses `out`.
        DataError: there are fewer than three episodes, or they belong to a model of another shape.
        FileError: `out` cannot be written.
        TDMPC2Error: training diverged.
    """
    _check_fits(model, data)
    trained = {}
    with in_use(out):
        for name in config.architectures:
            with progress.add(f"training {name}", config.updates, unit="updates") as stage:
                trained[name] = _train(name, model, data, config, Path(out) / name, stage, initial.get(name))
    return trained


def _check_fits(model: WorldModel, data: Recording) -> None:
    """Raise DataError for recordings of a model of another shape."""
    c = model.config
    task = data.task is None if not c.num_tasks else data.task is not None and 0 <= data.task < c.num_tasks
    if not task or (c.latent_dim, c.action_dim) != (data.latent.shape[1], data.plan.shape[2]):
        raise DataError("the episodes are of another model: collect episodes with this one")


def error_table(trained: Mapping[str, Trained]) -> Table:
    """The errors of correctors beside those of the plan and the policy prior."""
    errors = {name: t.errors for name, t in trained.items()}
    some = next(iter(errors.values()))
    last = len(some.plan)
    shown = sorted({k for k in (1, 2, 3, last // 2, last) if 1 <= k <= last})
    compared = {name: e.corrector for name, e in errors.items()}
    rows = []
    for name, error in {**compared, "plan": some.plan, "policy prior": some.prior}.items():
        numbers = [_mean(error), *(error[k - 1] for k in shown)]
        rows.append([name, *(f"{number:.4f}" for number in numbers)])
    columns = ["action of", "all steps", *(f"k = {k}" for k in shown)]
    return Table(columns, rows, "Mean L1 distance to the teacher's action, held-out episodes")


def _train(
    name: str,
    model: WorldModel,
    data: Recording,
    config: CorrectorTrainConfig,
    out: Path,
    stage: Stage,
    initial: BaseCorrector | None,
) -> Trained:
    c, steps, device = config, config.rollout_steps, data.latent.device
    horizon, action_dim = data.plan.shape[1:]
    starts, validation, test = split_starts(data, c.held_out_every)
    torch.manual_seed(c.seed)  # of the weights
    corrector = build_corrector(c.corrector(name, data.latent.shape[1], action_dim)).to(device)
    if initial is not None:
        corrector.load_state_dict(initial.state_dict())
    judge = _Judge(model, data, validation, steps, corrector)
    generator = torch.Generator().manual_seed(c.seed)
    optimizer = torch.optim.AdamW(corrector.parameters(), c.lr, weight_decay=c.weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, c.updates)

    out.mkdir(parents=True, exist_ok=True)
    save_corrector(out, corrector, data.teacher)  # the first best; untrained, it executes the plan
    best_error, plan_error = _mean(judge.error(corrector)), _mean(judge.plan)
    waited, began = 0, time.monotonic()
    total_loss = torch.zeros((), device=device)
    with open(out / "train.csv", "w", newline="") as file:
        log = csv.writer(file)
        log.writerow(["update", "train_loss", "validation_error", "plan_error", "seconds"])
        for update in range(1, c.updates + 1):
            start = starts[torch.randint(len(starts), (c.batch_size,), generator=generator)]
            earlier = torch.randint(1, steps + 2, start.shape, generator=generator).to(device)
            loss = c.rollout_coef * correction_loss(
                unroll(model, corrector, data, start, earlier, steps), c.residual_coef, c.loss
            )
            if recorded := min(horizon - 1, steps):
                unrolled = unroll(model, corrector, data, start, earlier, recorded, own_actions=False)
                loss = loss + correction_loss(unrolled, c.residual_coef, c.loss)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total_loss += loss.detach()
            stage.advance()
            if update % c.validate_every and update != c.updates:
                continue

            error = _mean(judge.error(corrector))
            mean_loss = float(total_loss) / ((update - 1) % c.validate_every + 1)
            if not math.isfinite(error + mean_loss):
                raise TDMPC2Error(f"training of {name} diverged by update {update}: lower distillation.lr")
            total_loss.zero_()
            log.writerow([update, mean_loss, error, plan_error, round(time.monotonic() - began, 2)])
            file.flush()
            waited += 1
            if error < best_error:
                best_error, waited = error, 0
                save_corrector(out, corrector, data.teacher)
            stage.note(f"error {best_error:.3f}, plan {plan_error:.3f}")
            if waited >= c.patience:
                stage.at(update, total=update)
                break
    corrector = load_corrector(out, data.teacher, device)
    judge = _Judge(model, data, test, steps, corrector)
    errors = Errors(judge.error(corrector), judge.plan, judge.prior)
    seeds = data.seed.unique().tolist()
    save_corrector(out, corrector, data.teacher, errors=errors._asdict(), seeds=seeds)
    return Trained(corrector.eval(), errors)


class _Judge:
    """Errors on fixed segments, spread evenly over held-out episodes.

    Attributes:
        plan, prior: errors of the two references.
    """

    def __init__(
        self, model: WorldModel, data: Recording, held_out: Tensor, steps: int, corrector: BaseCorrector
    ):
        self.model, self.data = model, data
        stride = max(len(held_out) // VALIDATION_STARTS, 1)
        self.start = held_out[::stride]
        # No error past the longest of these segments.
        self.steps = min(steps, int((data.last[self.start] - self.start).max()))
        self.earlier = torch.arange(len(self.start), device=self.start.device) % (steps + 1) + 1
        ahead = torch.arange(1, self.steps + 1, device=self.start.device)[:, None]
        step = (self.start + ahead).clamp(max=len(data.latent) - 1)
        with torch.no_grad():
            as_planned = self._unroll(corrector, own_actions=False)  # its actions are ignored
            self.plan = distance(as_planned.planned, as_planned).tolist()
            self.prior = distance(model.prior(data.latent[step], data.task), as_planned).tolist()

    def error(self, corrector: BaseCorrector) -> list[float]:
        """Errors of a corrector for k = 1 ... S; leaves it in training mode."""
        corrector.eval()
        with torch.no_grad():
            u = self._unroll(corrector)
        corrector.train()
        return distance(u.action, u).tolist()

    def _unroll(self, corrector: BaseCorrector, own_actions: bool = True) -> Unrolled:
        return unroll(
            self.model,
            corrector,
            self.data,
            self.start,
            self.earlier,
            self.steps,
            own_actions=own_actions,
        )


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
