"""What all tests share. Several run at once, so each process keeps to one thread."""

import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from tdmpc2.agent import SpeculativeAgent

FIXTURES = Path(__file__).parent / "fixtures"

os.environ["XDG_CACHE_HOME"] = str(Path(__file__).parents[1] / ".pytest_cache")
torch.set_num_threads(1)
settings.register_profile("tests", deadline=None, max_examples=25, derandomize=True)
settings.load_profile("tests")


@pytest.fixture
def unrefined(monkeypatch: pytest.MonkeyPatch) -> None:
    """Agents execute what their correctors say."""
    monkeypatch.setattr(SpeculativeAgent, "_refined", lambda self, z, action, planned, task: action)
