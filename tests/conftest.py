"""What all tests share. Several run at once, so each process keeps to one thread."""

import os
from pathlib import Path

import torch
from hypothesis import settings

FIXTURES = Path(__file__).parent / "fixtures"

os.environ["XDG_CACHE_HOME"] = str(Path(__file__).parents[1] / ".pytest_cache")
torch.set_num_threads(1)
settings.register_profile("tests", deadline=None, max_examples=25, derandomize=True)
settings.load_profile("tests")
