"""Making correctors: episodes of agents, labelled by the teacher, and training on them."""

from .collect import collect
from .dataset import Recording, episode_returns, load_shards
from .train import CorrectorTrainConfig, Errors, Trained, error_table, train_corrector

__all__ = [
    "CorrectorTrainConfig",
    "Errors",
    "Recording",
    "Trained",
    "collect",
    "episode_returns",
    "error_table",
    "load_shards",
    "train_corrector",
]
