"""How a corrector is made: data from where agents go, labelled by the teacher, and training."""

from .collect import collect
from .dataset import Recording, load_shards
from .train import CorrectorTrainConfig, Errors, Trained, check, train_corrector

__all__ = [
    "CorrectorTrainConfig",
    "Errors",
    "Recording",
    "Trained",
    "check",
    "collect",
    "load_shards",
    "train_corrector",
]
