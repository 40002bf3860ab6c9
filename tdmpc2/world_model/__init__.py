"""The TD-MPC2 world model and its files."""

from .checkpoint import fingerprint, load_world_model, save_world_model
from .model import PolicyOutput, WorldModel
from .two_hot import soft_cross_entropy, symexp, symlog, two_hot, two_hot_inv

__all__ = [
    "PolicyOutput",
    "WorldModel",
    "fingerprint",
    "load_world_model",
    "save_world_model",
    "soft_cross_entropy",
    "symexp",
    "symlog",
    "two_hot",
    "two_hot_inv",
]
