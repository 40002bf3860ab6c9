"""Processes that are forked off a process with an agent."""

import os
from functools import lru_cache, partial

import torch


@lru_cache
def forks_have_one_thread() -> None:
    """From now on, processes forked off this one compute with one thread until they say otherwise.

    A forked process has none of the threads that PyTorch computes with, and would wait for them for ever.
    """
    if hasattr(os, "register_at_fork"):  # there is none on Windows
        os.register_at_fork(after_in_child=partial(torch.set_num_threads, 1))
