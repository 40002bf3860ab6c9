"""Describe a checkpoint, without acting: tdmpc2 info FOLDER_OR_FILE."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from ..config import TEACHER, ModelOverride
from ..errors import DataError
from ..evaluation.modes import BASELINE
from ..files import read_json
from ..loading import open_checkpoint, read_mode
from ..world_model import fingerprint


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The checkpoint to describe."""

    agent: str  # an original .pt file, a teacher or an accelerated agent; `agent=` may be left out
    model: ModelOverride = field(default_factory=ModelOverride)


def main(settings: Settings) -> None:
    for name, value in about(settings):
        print(f"{name:18}{value}")


def about(settings: Settings) -> Iterator[tuple[str, str]]:
    """Names and values to print."""
    path = settings.agent
    opened = open_checkpoint(path, **settings.model.unsaid())
    saved, model, c = opened.saved, opened.model, opened.model.config
    mode, corrector = read_mode(path, model)
    if "task" in saved:
        yield "task", saved["task"]
    elif c.num_tasks:
        yield "tasks", f"{c.num_tasks}: give task= to let it act"
    parameters = sum(p.numel() for p in model.parameters())
    yield "world model", f"{parameters:,} parameters, latents of {c.latent_dim}, {c.num_q} Q heads"
    yield "observations", "x".join(map(str, c.obs_shape)) + (" pixels" if c.pixels else "")
    yield "actions", f"{c.action_dim}, in [-1, 1]"
    yield "planning budget", opened.planner.in_words()
    yield "discount", f"{opened.discount:.4g}"
    yield "mode", f"{BASELINE if mode == TEACHER else saved.get('mode', '')}: {mode.in_words()}"
    if corrector is not None:
        yield "corrector", f"{sum(p.numel() for p in corrector.parameters()):,} parameters"
    if mode.threshold:
        low, high = min(mode.threshold), max(mode.threshold)
        yield "thresholds", f"{low:.3g} to {high:.3g}; it replans if the mismatch is above"
    if "eval_return" in saved:
        yield "return", f"{saved['eval_return']:.1f} in training, at step {saved.get('step', 0):,}"
    yield from _evaluation(Path(path) / "evaluation", saved.get("mode", ""))
    yield "weights", fingerprint(model)
    yield from saved.get("provenance", {}).items()


def _evaluation(folder: Path, mode: str) -> Iterator[tuple[str, str]]:
    """The result of an accelerated agent's own evaluation."""
    if not (folder / "summary.csv").exists():
        return
    try:
        summary = pd.read_csv(folder / "summary.csv").set_index("mode")
        why = str(read_json(folder / "chosen.json")["why"])
        if mode in summary.index:
            numbers = ("return_mean", "return_ratio", "planner_calls")
            mean, ratio, calls = (float(summary.loc[mode, name]) for name in numbers)
            # There is no ratio if the return of replanning is not positive.
            kept = "" if math.isnan(ratio) else f", {ratio:.3f} times replanning at every step"
            yield "evaluated", f"return {mean:.1f}{kept}; {calls:.1%} planner calls"
    except (KeyError, TypeError, ValueError) as e:  # pandas' errors are ValueErrors
        raise DataError(f"{folder} is damaged or of another version: make the agent again") from e
    yield "chosen because", why
