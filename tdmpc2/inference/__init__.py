"""Fast inference: the world model arranged for planning, and compilation."""

from .ahead import AheadOfTime, Function
from .compiled import Compiled, dtype_of, resolved
from .fast_model import FastModel, Origin, origin
from .threads import forks_have_one_thread, threads
from .weights import FollowedWeights, Weights

__all__ = [
    "AheadOfTime",
    "Compiled",
    "FastModel",
    "FollowedWeights",
    "Function",
    "Origin",
    "Weights",
    "dtype_of",
    "forks_have_one_thread",
    "origin",
    "resolved",
    "threads",
]
