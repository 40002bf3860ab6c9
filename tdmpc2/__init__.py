"""Speculative TD-MPC2: plan once, execute several steps, correct them, replan when reality drifts."""

from typing import TYPE_CHECKING, Any

from .agent import TDMPC2, SpeculativeAgent, load_agent
from .errors import TDMPC2Error
from .version import __version__
from .world_model import WorldModel, load_world_model

if TYPE_CHECKING:
    from .envs import make_env

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


def __getattr__(name: str) -> Any:
    """`make_env`, when it is asked for: an agent that acts in a world of its own needs no Gymnasium."""
    if name == "make_env":
        from .envs import make_env

        return make_env
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
