"""Train correctors on collected data, and print their errors on held-out episodes with two references.

    tdmpc2 distill checkpoint=pretrained/cartpole-swingup data=data/cartpole-swingup \
        out=correctors/cartpole-swingup distillation.architecture=all
"""

from dataclasses import dataclass, field

from rich.console import Console

from .. import load_world_model
from ..checked import Checked
from ..config import ModelOverride
from ..distillation import CorrectorTrainConfig, error_table, load_shards, train_corrector
from ..progress import Progress
from ..world_model import fingerprint


@dataclass(frozen=True, kw_only=True)
class Settings(Checked):
    """The teacher, the data, and where to write the correctors."""

    checkpoint: str  # the teacher: an original .pt file or our folder
    data: str  # folder of shards, or a folder of such folders
    out: str  # folder; each corrector gets a subfolder
    device: str = "cpu"
    model: ModelOverride = field(default_factory=ModelOverride)
    distillation: CorrectorTrainConfig = field(default_factory=CorrectorTrainConfig)


def main(settings: Settings) -> None:
    s = settings
    model = load_world_model(s.checkpoint, s.device, **s.model.unsaid())
    data = load_shards(s.data, fingerprint(model)).to(s.device)
    with Progress(Console()) as progress:
        trained = train_corrector(model, data, s.distillation, s.out, progress=progress)
        progress.table(error_table(trained))
