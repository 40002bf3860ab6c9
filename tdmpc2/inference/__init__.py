"""The world model as the planner computes it: the same functions, arranged for the machine."""

from .fast_model import FastModel, Origin, fastest
from .weights import Weights

__all__ = ["FastModel", "Origin", "Weights", "fastest"]
