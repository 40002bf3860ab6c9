"""Accelerate a checkpoint, and write a report that compares it with the teacher: the main job.

tdmpc2 accelerate task=cartpole-swingup checkpoint=pretrained/cartpole-swingup
"""

from rich.console import Console

from ..accelerate import AccelerateConfig as Settings
from ..accelerate import accelerate
from ..progress import Progress


def main(settings: Settings) -> None:
    with Progress(Console()) as progress:
        accelerate(settings, progress)
