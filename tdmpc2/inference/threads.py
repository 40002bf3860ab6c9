"""How many threads compute."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache, partial

import torch


@contextmanager
def threads(number: int | None) -> Iterator[None]:
    """Meanwhile this thread of the program computes with `number` threads; None: no change."""
    before = torch.get_num_threads()
    if number is None or number == before:
        yield
        return
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@lru_cache
def forks_have_one_thread() -> None:
    """From now on, processes forked from this one use one thread, unless they set another number.

    A forked process lacks PyTorch's compute threads and would wait for them forever.
    """
    if hasattr(os, "register_at_fork"):  # not on Windows
        os.register_at_fork(after_in_child=partial(torch.set_num_threads, 1))
