"""Train a TD-MPC2 teacher online: python scripts/train.py task=cartpole-swingup model_size=1."""

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from tdmpc2.cli import run
from tdmpc2.training.trainer import TrainConfig, Trainer


def main(config: TrainConfig) -> None:
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    trainer = Trainer(config)
    console = Console()
    size = sum(p.numel() for p in trainer.update.model_params + trainer.update.policy_params)
    console.print(
        f"{config.task}: {size:,} parameters, {trainer.seed_steps:,} seed steps, "
        f"{trainer.planner}, into {trainer.folder}"
    )
    if trainer.step:
        console.print(f"going on from step {trainer.step:,}")
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        speed_estimate_period=120,
    )
    bar = progress.add_task(config.task, total=config.steps, completed=trainer.step, note="")

    def show(trainer: Trainer) -> None:
        speed = progress.tasks[0].speed
        note = [] if speed is None else [f"{speed:.1f} steps/s"]
        note += [f"{name} {value:.1f}" for name, value in trainer.returns.items()]
        progress.update(bar, completed=trainer.step, note="  ".join(note))

    with progress:
        teacher = trainer.run(on_step=show, report=progress.print)
    console.print(f"best evaluation {trainer.best_return:.1f}; the teacher is in {teacher}")


if __name__ == "__main__":
    run(TrainConfig, main)
