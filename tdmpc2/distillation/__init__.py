"""How a corrector is made: data from where agents go, labelled by the teacher, and training."""

from .collect import TEACHER, collect
from .dataset import Recording, load_shards
from .train import CorrectorTrainConfig, Trained, Validation, train_corrector, validation_table

__all__ = [
    "TEACHER",
    "CorrectorTrainConfig",
    "Recording",
    "Trained",
    "Validation",
    "collect",
    "load_shards",
    "train_corrector",
    "validation_table",
]
