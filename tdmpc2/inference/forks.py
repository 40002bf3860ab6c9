"""Threads in forked processes."""

import os
from functools import lru_cache, partial

import torch


@lru_cache
def forks_have_one_thread() -> None:
    """From now on, processes forked from this one use one thread, unless they set another number.

    A forked process lacks PyTorch's compute threads and would wait for them forever.
    """
    if hasattr(os, "register_at_fork"):  # not on Windows
        os.register_at_fork(after_in_child=partial(torch.set_num_threads, 1))
