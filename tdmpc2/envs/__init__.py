"""Gymnasium environments by task name, in the form that TD-MPC2 expects."""

from .gymnasium_tasks import import_module
from .make import is_episodic, list_tasks, make_env, max_episode_steps
from .padding import PadForModel

__all__ = [
    "PadForModel",
    "import_module",
    "is_episodic",
    "list_tasks",
    "make_env",
    "max_episode_steps",
]
