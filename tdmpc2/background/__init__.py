"""Planning in the background: an agent whose actions do not wait for its plans."""

from collections.abc import Callable

from ..agent import TDMPC2, SpeculativeAgent
from ..config import SpeculationConfig
from ..corrector import BaseCorrector
from ..errors import ConfigError
from .agent import BackgroundAgent, Simulated

__all__ = ["BackgroundAgent", "Simulated", "in_background"]


def in_background(
    make_teacher: Callable[[], TDMPC2],
    mode: SpeculationConfig,
    corrector: BaseCorrector | None = None,
    *,
    delay: int | None = None,
) -> SpeculativeAgent:
    """An agent that plans in the background; one without plans is the usual agent.

    Args:
        make_teacher: makes a teacher; the process that plans makes its own. Later changes of the model's
            weights do not reach that process.
        mode: how plans are executed.
        corrector: corrects them.
        delay: None: plans are made in another process. A number: each is made at once, and taken so many
            steps later; the result does not depend on the machine's speed.

    Raises:
        ConfigError: the teacher computes on a GPU, or the mode replans at every step.
    """
    teacher = make_teacher()
    if mode.plan_length == 0 or delay == 0:
        return SpeculativeAgent(teacher, mode, corrector)
    if teacher.device.type != "cpu":
        raise ConfigError("planning in the background works on CPUs only: load the agent with device=cpu")

    from .process import PlannerProcess  # loads joblib, which other agents do not need

    def make() -> SpeculativeAgent:
        return SpeculativeAgent(make_teacher(), mode, corrector)

    source = PlannerProcess(make) if delay is None else Simulated(make())
    return BackgroundAgent(teacher, mode, corrector, source=source, delay=delay)
