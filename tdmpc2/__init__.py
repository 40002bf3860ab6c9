"""Speculative TD-MPC2: plan once, execute several steps, correct them, replan on a large mismatch."""

import importlib
from typing import TYPE_CHECKING, Any

from .agent import TDMPC2, Kind, SpeculativeAgent, StepInfo
from .background import BackgroundAgent
from .errors import TDMPC2Error
from .loading import load_agent
from .version import __version__
from .world_model import WorldModel, load_world_model

if TYPE_CHECKING:
    from . import envs
    from .envs import make_env

__all__ = [
    "TDMPC2",
    "BackgroundAgent",
    "Kind",
    "SpeculativeAgent",
    "StepInfo",
    "TDMPC2Error",
    "WorldModel",
    "__version__",
    "envs",
    "load_agent",
    "load_world_model",
    "make_env",
]


def __getattr__(name: str) -> Any:
    """Import `envs` and `make_env` on first use: an agent itself does not need Gymnasium."""
    if name not in ("envs", "make_env"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    envs = importlib.import_module(".envs", __name__)
    return envs if name == "envs" else envs.make_env
