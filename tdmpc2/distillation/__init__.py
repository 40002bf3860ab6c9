"""How a corrector is made: data from where agents go, labelled by the teacher, and training."""

from .collect import collect
from .dataset import Recording, load_shards
from .train import CorrectorTrainConfig, Errors, Trained, error_table, train_corrector

__all__ = [
    "CorrectorTrainConfig",
    "Errors",
    "Recording",
    "Trained",
    "check",
    "collect",
    "error_table",
    "load_shards",
    "train_corrector",
]
