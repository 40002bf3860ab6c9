"""The main job: a TD-MPC2 checkpoint and a task in, an accelerated agent and the evidence for it out.

python scripts/accelerate.py task=cartpole-swingup checkpoint=pretrained/cartpole-swingup
"""

from rich.console import Console

from tdmpc2 import cli
from tdmpc2.accelerate import AccelerateConfig, accelerate

if __name__ == "__main__":
    cli.run(AccelerateConfig, lambda config: accelerate(config, Console()))
