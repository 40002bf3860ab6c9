"""Collect corrector data: whole episodes; the teacher plans at every state.

    tdmpc2 collect task=cartpole-swingup checkpoint=pretrained/cartpole-swingup out=data/cartpole-swingup

By default the teacher acts. With `corrector=FOLDER execution_horizon=6` the speculative agent acts, and the
teacher labels. A second run continues at the first missing shard.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path

from rich.console import Console

from ..checked import Checked, at_least
from ..config import BudgetOverride, ModelOverride, SpeculationConfig
from ..corrector import FILE, load_corrector
from ..distillation import collect
from ..errors import ConfigError
from ..evaluation.modes import DISTILLED
from ..progress import Progress
from ..teacher import open_teacher
from ..workers import Workers


@dataclass(frozen=True, kw_only=True)
class Settings(Checked):
    """What to collect, where to write it, and who acts."""

    task: str  # e.g. walker-walk
    checkpoint: str  # the teacher: an original .pt file or our folder
    out: str  # folder of the shards
    episodes: int = 8
    seed: int = 0  # of the first episode; later episodes count up
    num_envs: int = 1  # episodes per batch; a batch makes one shard; give 10 on a GPU
    workers: int = 0  # processes with one thread each; 0: one per core, on a GPU one in all
    execution_horizon: int = 1  # steps executed per plan; 1: the teacher acts
    corrector: str = ""  # folder of the acting agent's corrector; empty: none
    device: str = "cpu"
    planner: BudgetOverride = field(default_factory=BudgetOverride)
    model: ModelOverride = field(default_factory=ModelOverride)

    def check_ranges(self) -> None:
        at_least(1, self, "episodes", "num_envs", "execution_horizon")
        at_least(0, self, "seed", "workers")


def main(settings: Settings) -> None:
    s = settings
    teacher = open_teacher(s.task, s.checkpoint, s.planner, s.model, s.device)
    behaviour, correctors = SpeculationConfig(execution_horizon=s.execution_horizon), {}
    if s.corrector:
        folder = Path(s.corrector)
        if within := sorted(path.parent for path in folder.glob(f"*/{FILE}")):
            raise ConfigError(
                f"corrector={folder} holds several correctors: give one of {', '.join(map(str, within))}"
            )
        corrector = load_corrector(folder, teacher.fingerprint, s.device)
        name = corrector.config.architecture
        if s.execution_horizon == 1 and name != DISTILLED:
            raise ConfigError("execution_horizon=1: this mode corrects no step; give 3 or more")
        correctors[name] = corrector
        behaviour = replace(behaviour, corrector=name)
    with Progress(Console()) as progress:
        paths = collect(
            teacher,
            s.out,
            episodes=s.episodes,
            seed=s.seed,
            num_envs=s.num_envs,
            behaviours=[behaviour],
            correctors=correctors,
            workers=Workers.of(s.workers, s.device, progress),
        )
    print(f"{s.episodes} episodes in {len(paths)} shards in {s.out}")
