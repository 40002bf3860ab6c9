"""Training a corrector: batches of stretches drawn on the fly, judged on held-out episodes.

The validation error is the mean squared distance to the teacher's action over the steps after the
first of each plan. It stands beside two references on the same steps: the plan executed as it is,
and the policy prior at the real latent. The best weights are on disk after every validation.
"""

import csv
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor

from ..config import CorrectorConfig
from ..corrector import (
    ARCHITECTURES,
    BaseCorrector,
    build_corrector,
    load_corrector,
    save_corrector,
)
from ..errors import ConfigError
from ..world_model.model import WorldModel
from .dataset import Recording, split_starts
from .losses import correction_loss, squared_error, unroll

VALIDATION_STARTS = 1024  # stretches that a validation looks at


@dataclass(frozen=True)
class CorrectorTrainConfig:
    """How correctors are trained."""

    architecture: str = "both"  # or one of them: two_tower, temporal
    seed: int = 0
    updates: int = 600  # at most
    batch_size: int = 64  # stretches
    rollout_steps: int = 6  # corrected steps of a stretch
    rollout_coef: float = 1.0  # weight of the rollout loss beside the distillation loss
    residual_coef: float = 1e-3  # lambda: weight of ||delta_a||^2
    lr: float = 1e-3  # falls to zero along a cosine
    weight_decay: float = 1e-3
    validate_every: int = 100  # updates
    patience: int = 5  # validations without a better one before training stops
    held_out_every: int = 5  # every fifth episode is for validation
    width: int = 256
    window: int = 8  # steps, of the temporal corrector
    num_layers: int = 2
    num_heads: int = 4


class Validation(NamedTuple):
    """Mean squared distance to the teacher's action on held-out episodes, for k = 1 ... S."""

    corrector: list[float]
    plan: list[float]
    prior: list[float]


class Trained(NamedTuple):
    corrector: BaseCorrector
    validation: Validation
    seconds: float


def train_corrector(
    model: WorldModel, data: Recording, config: CorrectorTrainConfig, out: str | Path
) -> dict[str, Trained]:
    """Train one corrector or both, print how good they are, and return them by architecture.

    Writes `out/ARCHITECTURE/corrector.safetensors` and beside it `train.csv`.

    Args:
        model: the teacher's world model; `data` must be of it and on its device.
        data: from `load_shards`.
        config: how to train.
        out: folder, one folder for each architecture inside.

    Raises:
        ConfigError: there is no such architecture, or a setting cannot be.
        DataError: there are fewer than two episodes.
    """
    names = list(ARCHITECTURES) if config.architecture == "both" else [config.architecture]
    if min(config.updates, config.batch_size, config.rollout_steps, config.validate_every) < 1:
        raise ConfigError("updates, batch_size, rollout_steps and validate_every must be positive")
    if config.held_out_every < 2:
        raise ConfigError(f"held_out_every={config.held_out_every}: must be at least 2")
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.fields[status]}")) as progress:
        trained = {name: _train(name, model, data, config, Path(out) / name, progress) for name in names}
    Console().print(validation_table({name: t.validation for name, t in trained.items()}))
    return trained


def validation_table(validations: dict[str, Validation]) -> Table:
    """The validation errors of correctors beside those of the plan and the policy prior."""
    table = Table(title="Mean squared distance to the teacher's action, held-out episodes")
    some = next(iter(validations.values()))
    last = len(some.plan)
    shown = sorted({k for k in (1, 2, 3, last // 2, last) if 1 <= k <= last})
    for column in ("action of", "all steps", *(f"k = {k}" for k in shown)):
        table.add_column(column, justify="left" if column == "action of" else "right")
    rows = {name: v.corrector for name, v in validations.items()}
    for name, error in {**rows, "plan": some.plan, "policy prior": some.prior}.items():
        numbers = [sum(error) / len(error), *(error[k - 1] for k in shown)]
        table.add_row(name, *(f"{number:.4f}" for number in numbers))
    return table


def _train(
    name: str,
    model: WorldModel,
    data: Recording,
    config: CorrectorTrainConfig,
    out: Path,
    progress: Progress,
) -> Trained:
    c, steps, device = config, config.rollout_steps, data.latent.device
    horizon, action_dim = data.plan_actions.shape[1:]
    torch.manual_seed(c.seed)  # of the weights
    corrector = build_corrector(
        CorrectorConfig(
            latent_dim=data.latent.shape[1],
            action_dim=action_dim,
            architecture=name,
            width=c.width,
            window=c.window,
            num_layers=c.num_layers,
            num_heads=c.num_heads,
            max_k=steps + 1,  # execution beyond the steps trained on takes the last one's embedding
        )
    ).to(device)
    starts, held_out = split_starts(data, c.held_out_every)
    judge = _Judge(model, data, held_out, steps)
    judge.references(corrector)
    generator = torch.Generator().manual_seed(c.seed)
    optimizer = torch.optim.AdamW(corrector.parameters(), c.lr, weight_decay=c.weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, c.updates)

    out.mkdir(parents=True, exist_ok=True)
    best, best_error, waited, began = judge.validate(corrector), torch.inf, 0, time.monotonic()
    total_loss = torch.zeros((), device=device)
    bar = progress.add_task(name, total=c.updates, status="")
    with open(out / "train.csv", "w", newline="") as file:
        log = csv.writer(file)
        log.writerow(["update", "train_loss", "validation_error", "plan_error", "prior_error", "s"])
        for update in range(1, c.updates + 1):
            start = starts[torch.randint(len(starts), (c.batch_size,), generator=generator)]
            earlier = torch.randint(1, steps + 2, start.shape, generator=generator).to(device)
            loss = c.rollout_coef * correction_loss(
                unroll(model, corrector, data, start, earlier, steps), c.residual_coef
            )
            if recorded := min(horizon - 1, steps):
                unrolled = unroll(model, corrector, data, start, earlier, recorded, own_actions=False)
                loss = loss + correction_loss(unrolled, c.residual_coef)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total_loss += loss.detach()
            progress.advance(bar)
            if update % c.validate_every and update != c.updates:
                continue

            validation = judge.validate(corrector)
            error, plan, prior = (sum(x) / len(x) for x in validation)
            mean_loss = float(total_loss) / ((update - 1) % c.validate_every + 1)
            total_loss.zero_()
            seconds = time.monotonic() - began
            log.writerow([update, mean_loss, error, plan, prior, round(seconds, 2)])
            file.flush()
            waited += 1
            if error < best_error:
                best, best_error, waited = validation, error, 0
                record = {"validation": validation._asdict(), "updates": update}
                save_corrector(out, corrector, data.teacher, **record)
            progress.update(bar, status=f"error {best_error:.4f}, plan {plan:.4f}")
            if waited >= c.patience:
                progress.update(bar, total=update)
                break
    return Trained(load_corrector(out, data.teacher, device), best, time.monotonic() - began)


class _Judge:
    """Validation on stretches spread evenly over the held-out episodes, always the same."""

    def __init__(self, model: WorldModel, data: Recording, held_out: Tensor, steps: int):
        self.model, self.data, self.steps = model, data, steps
        stride = max(len(held_out) // VALIDATION_STARTS, 1)
        self.start = held_out[::stride]
        self.earlier = torch.arange(len(self.start), device=self.start.device) % (steps + 1) + 1

    @torch.no_grad()
    def references(self, corrector: BaseCorrector) -> None:
        """Judge the plan and the prior; any corrector will do, for its answers are not used."""
        corrector.eval()
        data, offsets = self.data, torch.arange(1, self.steps + 1, device=self.start.device)
        u = unroll(self.model, corrector, data, self.start, self.earlier, self.steps, own_actions=False)
        self.plan = squared_error(u.planned, u).tolist()
        step = (self.start + offsets[:, None]).clamp(max=len(data.latent) - 1)
        self.prior = squared_error(self.model.pi(data.latent[step], data.task).mean, u).tolist()

    @torch.no_grad()
    def validate(self, corrector: BaseCorrector) -> Validation:
        corrector.eval()
        u = unroll(self.model, corrector, self.data, self.start, self.earlier, self.steps)
        corrector.train()
        return Validation(squared_error(u.action, u).tolist(), self.plan, self.prior)
