"""Speculative TD-MPC2: plan once, execute several steps, correct them, replan when reality drifts."""

from .agent import TDMPC2, SpeculativeAgent, load_agent
from .envs import make_env
from .errors import TDMPC2Error
from .version import __version__
from .world_model import WorldModel, load_world_model

__all__ = [
    "TDMPC2",
    "SpeculativeAgent",
    "TDMPC2Error",
    "WorldModel",
    "__version__",
    "load_agent",
    "load_world_model",
    "make_env",
]
