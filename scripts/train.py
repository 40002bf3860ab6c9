"""Train a TD-MPC2 teacher online: python scripts/train.py task=cartpole-swingup model_size=1."""

import torch
from rich.console import Console

from tdmpc2.cli import run
from tdmpc2.progress import Progress
from tdmpc2.training.trainer import TrainConfig, Trainer


def main(config: TrainConfig) -> None:
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    trainer = Trainer(config)
    size = sum(p.numel() for p in trainer.update.model_params + trainer.update.policy_params)
    with Progress(Console()) as progress:
        progress.print(
            f"{config.task}: {size:,} parameters, {trainer.seed_steps:,} seed steps, "
            f"{trainer.planner}, into {trainer.folder}"
        )
        teacher = trainer.run(progress)
        progress.print(f"best evaluation {trainer.best_return:.1f}; the teacher is in {teacher}")


if __name__ == "__main__":
    run(TrainConfig, main)
