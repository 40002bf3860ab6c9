"""Does planning in bfloat16 lose return? The same episodes in both precisions.

    python research/precision.py task=cartpole-swingup checkpoint=pretrained/cartpole-swingup

Writes `results/precision/TASK.csv`, an episode a row, and `TASK.json`: the ratio of the mean returns with its
95 % paired bootstrap interval.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path

import pandas as pd
from rich.console import Console

from tdmpc2 import SpeculativeAgent, cli
from tdmpc2.checked import Checked
from tdmpc2.config import TEACHER, BudgetOverride, ComputeConfig, ModelOverride
from tdmpc2.errors import ConfigError
from tdmpc2.evaluation.config import EpisodesConfig
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
    device: str = "cpu"
    out: str = "results/precision"
    planner: BudgetOverride = field(default_factory=BudgetOverride)
    model: ModelOverride = field(default_factory=ModelOverride)
    evaluation: EpisodesConfig = field(default_factory=lambda: EpisodesConfig(seed=30_000))

    def check_ranges(self) -> None:
        if self.evaluation.episodes < 2:
            raise ConfigError("evaluation.episodes=1: a single one has no interval")


def main(config: PrecisionConfig) -> None:
    teacher = open_teacher(config.task, config.checkpoint, config.planner, config.model, config.device)
    seeds, returns = config.evaluation.seeds, {}
    n = min(config.evaluation.num_envs, len(seeds))
    for precision in ("float32", "bfloat16"):
        compute = ComputeConfig(precision, config.planner.compile)
        planning = replace(teacher, compute=compute).agent(n, seeds[0])
        agent = SpeculativeAgent(planning, TEACHER)
        returns[precision] = rollout(agent, teacher.env, seeds).episodes["return"].to_numpy()
        Console().print(f"{precision}: mean return {returns[precision].mean():.1f}")
    ratio, low, high = paired_ratio(returns["bfloat16"], returns["float32"])
    Console().print(f"bfloat16 keeps {ratio:.4f} [{low:.4f}, {high:.4f}]")
    path = Path(config.out) / config.task
    with atomic_write(path.with_suffix(".csv")) as tmp:
        pd.DataFrame({"seed": seeds, **returns}).to_csv(tmp, index=False)
    content = {**provenance(), "ratio": ratio, "low": low, "high": high, "episodes": len(seeds)}
    write_json(path.with_suffix(".json"), content)


if __name__ == "__main__":
    cli.run(PrecisionConfig, main)
