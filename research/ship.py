"""Put an accelerated agent in the place of its teacher in `pretrained/`.

    python research/ship.py agent=accelerated/walker-walk teacher=pretrained/walker-walk

What the teacher's folder says of its training stays. The corrector of the chosen mode is added, with the
summary of the agent's evaluation and where it comes from.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path

from tdmpc2 import cli
from tdmpc2.checked import Checked
from tdmpc2.errors import ConfigError
from tdmpc2.files import atomic_write, read_json, write_json
from tdmpc2.loading import open_checkpoint, read_mode
from tdmpc2.world_model import fingerprint

KEPT = ("step", "eval_return")  # what the teacher's config.json says of its training
EVIDENCE = ("summary.csv", "chosen.json", "provenance.json")


@dataclass(frozen=True, kw_only=True)
class Settings(Checked):
    """The agent, and the teacher that it replaces."""

    agent: str  # a folder that `tdmpc2 accelerate` finished
    teacher: str  # the folder of its teacher


def main(settings: Settings) -> None:
    agent, teacher = Path(settings.agent), Path(settings.teacher)
    models = [open_checkpoint(folder).model for folder in (agent, teacher)]
    if len({fingerprint(model) for model in models}) > 1:
        raise ConfigError(f"{agent} has another teacher than {teacher}")
    mode, _ = read_mode(agent, models[0])
    if mode.corrector:
        source = agent / "correctors" / mode.corrector
        shutil.copytree(source, teacher / "correctors" / mode.corrector, dirs_exist_ok=True)
    for name in EVIDENCE:
        with atomic_write(teacher / "evaluation" / name) as tmp:
            shutil.copyfile(agent / "evaluation" / name, tmp)
    before, config = (read_json(folder / "config.json") for folder in (teacher, agent))
    write_json(teacher / "config.json", {**config, **{name: before[name] for name in KEPT if name in before}})
    print(f"{teacher} acts in mode {config['mode']}")


if __name__ == "__main__":
    cli.run(Settings, main)
