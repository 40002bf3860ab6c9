"""Does planning in bfloat16 lose return? The same episodes in both precisions.

    python research/precision.py task=cartpole-swingup checkpoint=pretrained/cartpole-swingup

Writes `results/precision/TASK.csv`, an episode a row, and `TASK.json`: the ratio of the mean returns with its
95 % paired bootstrap interval.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path

import pandas as pd
from rich.console import Console

from tdmpc2 import cli
from tdmpc2.agent import SpeculativeAgent
from tdmpc2.checked import Checked, at_least
from tdmpc2.config import TEACHER, BudgetOverride, ComputeConfig, ModelOverride
from tdmpc2.evaluation.metrics import paired_ratio
from tdmpc2.evaluation.rollout import rollout
from tdmpc2.files import atomic_write, write_json
from tdmpc2.provenance import provenance
from tdmpc2.teacher import open_teacher


@dataclass(frozen=True, kw_only=True)
class PrecisionConfig(Checked):
    """Whose precision is judged, on which episodes."""

    task: str
    checkpoint: str
    episodes: int = 20
    seed: int = 30_000  # of the first episode
    num_envs: int = 10
    device: str = "cpu"
    out: str = "results/precision"
    planner: BudgetOverride = field(default_factory=BudgetOverride)
    model: ModelOverride = field(default_factory=ModelOverride)

    def check_ranges(self) -> None:
        at_least(2, self, "episodes")
        at_least(1, self, "num_envs")
        at_least(0, self, "seed")


def main(config: PrecisionConfig) -> None:
    teacher = open_teacher(config.task, config.checkpoint, config.planner, config.model, config.device)
    seeds = range(config.seed, config.seed + config.episodes)
    returns = {}
    for precision in ("float32", "bfloat16"):
        compute = ComputeConfig(precision, config.planner.compile)
        planning = replace(teacher, compute=compute).agent(min(config.num_envs, config.episodes), config.seed)
        agent = SpeculativeAgent(planning, TEACHER)
        returns[precision] = rollout(agent, teacher.env, seeds).episodes["return"].to_numpy()
        Console().print(f"{precision}: mean return {returns[precision].mean():.1f}")
    ratio, low, high = paired_ratio(returns["bfloat16"], returns["float32"])
    Console().print(f"bfloat16 keeps {ratio:.4f} [{low:.4f}, {high:.4f}]")
    path = Path(config.out) / config.task
    with atomic_write(path.with_suffix(".csv")) as tmp:
        pd.DataFrame({"seed": seeds, **returns}).to_csv(tmp, index=False)
    content = {**provenance(), "ratio": ratio, "low": low, "high": high, "episodes": config.episodes}
    write_json(path.with_suffix(".json"), content)


if __name__ == "__main__":
    cli.run(PrecisionConfig, main)
