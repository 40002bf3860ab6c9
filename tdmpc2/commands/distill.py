"""Train correctors on collected data, and print their error on held-out episodes beside two references.

    tdmpc2 distill checkpoint=pretrained/cartpole-swingup data=data/cartpole-swingup \
        out=correctors/cartpole-swingup architecture=all
"""

from dataclasses import dataclass

from rich.console import Console

from .. import load_world_model
from ..config import ModelOverride, part
from ..distillation import CorrectorTrainConfig, error_table, load_shards, train_corrector
from ..progress import Progress
from ..world_model import fingerprint


@dataclass(frozen=True, kw_only=True)
class Settings(ModelOverride, CorrectorTrainConfig):
    """How correctors are trained, for which teacher, on which data."""

    checkpoint: str  # of the teacher: an original .pt file or a folder of ours
    data: str  # folder of shards, or a folder of such folders
    out: str  # the correctors come in folders of their own in here
    device: str = "cpu"


def main(settings: Settings) -> None:
    model = load_world_model(settings.checkpoint, settings.device, **settings.unsaid())
    data = load_shards(settings.data, fingerprint(model)).to(settings.device)
    with Progress(Console()) as progress:
        trained = train_corrector(
            model, data, part(CorrectorTrainConfig, settings), settings.out, progress=progress
        )
        progress.table(error_table(trained))
