"""Train a TD-MPC2 teacher online: tdmpc2 train task=cartpole-swingup model_size=1."""

import torch
from rich.console import Console

from ..progress import Progress
from ..training.trainer import TrainConfig as Settings
from ..training.trainer import Trainer


def main(settings: Settings) -> None:
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    trainer = Trainer(settings)
    size = sum(p.numel() for p in trainer.update.model_params + trainer.update.policy_params)
    with Progress(Console()) as progress:
        progress.print(
            f"{settings.task}: {size:,} parameters, {trainer.seed_steps:,} seed steps, "
            f"{trainer.planner}, into {trainer.folder}"
        )
        teacher = trainer.run(progress)
        progress.print(f"best evaluation {trainer.best_return:.1f}; the teacher is in {teacher}")
