"""The settings of each part: one frozen dataclass per part.

Names and defaults come from the TD-MPC2 paper (Hansen, Su, Wang 2024, appendix "Hyperparameters")
unless a comment says otherwise. A command's settings have these parts as fields: a user types
`planner.num_samples=256`.
"""

from dataclasses import dataclass, fields, replace
from typing import TypedDict

from .checked import Checked, at_least, check_range, within
from .errors import ConfigError

SYMLOG = (-80, 80)  # beyond, symexp leaves float32


@dataclass(frozen=True)
class WorldModelConfig(Checked):
    """Architecture of a world model; for a checkpoint, read from the shapes of its tensors."""

    obs_shape: tuple[int, ...]  # (obs_dim,) for states, (channels, 64, 64) for pixels
    action_dim: int
    enc_dim: int = 256
    num_enc_layers: int = 2
    num_channels: int = 32  # of the pixel encoder
    mlp_dim: int = 512
    latent_dim: int = 512
    num_q: int = 5
    num_bins: int = 101
    vmin: float = -10.0  # symlog units
    vmax: float = 10.0
    simnorm_dim: int = 8  # entries per simplex
    dropout: float = 0.01  # in the first layer of each Q head, in training only
    log_std_min: float = -10.0
    log_std_max: float = 2.0
    episodic: bool = False  # has a termination head
    num_tasks: int = 0  # 0: single-task, no task embedding
    task_dim: int = 0  # 96 in the published multi-task models
    action_dims: tuple[int, ...] = ()  # per task, without padding

    @property
    def pixels(self) -> bool:
        return len(self.obs_shape) == 3

    def check_ranges(self) -> None:
        if self.num_bins < 2:
            raise ConfigError(
                f"num_bins={self.num_bins}: must be at least 2; models trained by plain regression "
                "(num_bins=0 or 1 in the original) are not supported"
            )
        pixels = self.pixels and self.obs_shape[1:] == (64, 64)
        if not pixels and len(self.obs_shape) != 1:
            raise ConfigError(f"obs_shape={self.obs_shape}: must be (obs_dim,) or (channels, 64, 64)")
        for dim in self.obs_shape:
            check_range("obs_shape", dim, 1, 100_000)
        within(self, 1, 1000, "action_dim", "num_q")
        within(self, 1, 100_000, "enc_dim", "num_channels", "mlp_dim", "latent_dim", "num_bins")
        within(self, 1, 100, "num_enc_layers")
        within(self, 0, 1000, "num_tasks", "task_dim")
        within(self, 0, 0.999, "dropout")
        within(self, *SYMLOG, "vmin", "vmax")
        within(self, -100, 100, "log_std_min", "log_std_max")
        for low, high in (("vmin", "vmax"), ("log_std_min", "log_std_max")):
            if not getattr(self, low) < getattr(self, high):
                raise ConfigError(f"{low}={getattr(self, low)}: must be below {high}={getattr(self, high)}")
        if self.simnorm_dim < 1 or self.latent_dim % self.simnorm_dim:
            raise ConfigError(
                f"simnorm_dim={self.simnorm_dim}: must divide latent_dim, {self.latent_dim}; give the "
                "simnorm_dim of training: an original file does not contain it"
            )
        if bool(self.num_tasks) != bool(self.task_dim) or len(self.action_dims) != self.num_tasks:
            raise ConfigError(
                f"num_tasks={self.num_tasks}: does not match task_dim={self.task_dim} and "
                f"{len(self.action_dims)} action_dims"
            )
        for dim in self.action_dims:
            check_range("action_dims", dim, 1, self.action_dim)


# The paper's model sizes, in millions of parameters.
MODEL_SIZES: dict[int, dict[str, int]] = {
    1: dict(enc_dim=256, mlp_dim=384, latent_dim=128, num_enc_layers=2, num_q=2),
    5: dict(enc_dim=256, mlp_dim=512, latent_dim=512, num_enc_layers=2, num_q=5),
    19: dict(enc_dim=1024, mlp_dim=1024, latent_dim=768, num_enc_layers=3, num_q=5),
    48: dict(enc_dim=1792, mlp_dim=1792, latent_dim=768, num_enc_layers=4, num_q=5),
    317: dict(enc_dim=4096, mlp_dim=4096, latent_dim=1376, num_enc_layers=5, num_q=8),
}


@dataclass(frozen=True)
class PlannerConfig(Checked):
    """MPPI in latent space. The planning budget is samples x iterations x horizon."""

    horizon: int = 3  # steps
    iterations: int = 6
    num_samples: int = 512
    num_elites: int = 64
    num_pi_trajs: int = 24  # samples that follow the policy prior
    temperature: float = 0.5
    min_std: float = 0.05  # of an action in [-1, 1]
    max_std: float = 2.0

    def check_ranges(self) -> None:
        within(self, 1, 100, "horizon")
        within(self, 1, 1000, "iterations")
        within(self, 1, 1_000_000, "num_samples")
        for name, least in (("num_elites", 1), ("num_pi_trajs", 0)):
            if not least <= getattr(self, name) <= self.num_samples:
                raise ConfigError(
                    f"{name}={getattr(self, name)}: must be from {least} to num_samples, {self.num_samples}"
                )
        within(self, 0, 1000, "temperature")
        within(self, 0, 100, "max_std")
        if not 0 <= self.min_std <= self.max_std:
            raise ConfigError(f"min_std={self.min_std}: must be from 0 to max_std, {self.max_std}")

    def in_words(self) -> str:
        """The planning budget, e.g. `512 samples, 6 iterations, 64 elites, horizon 3`."""
        return (
            f"{self.num_samples} samples, {self.iterations} iterations, {self.num_elites} elites, "
            f"horizon {self.horizon}"
        )


PRECISIONS = ("auto", "float32", "bfloat16")


@dataclass(frozen=True)
class ComputeConfig(Checked):
    """Precision and compilation of the planner."""

    # Of matrix products in planning. "auto": bfloat16 where the processor or GPU computes in it, or float32.
    precision: str = "float32"
    compile: bool = False  # takes tens of seconds, once per machine

    def check_ranges(self) -> None:
        if self.precision not in PRECISIONS:
            raise ConfigError(f"precision={self.precision}: must be one of {', '.join(PRECISIONS)}")


EAGER = ComputeConfig()
# The default of commands and `load_agent`, unless the checkpoint names a precision. Results in float32 are
# the same on all machines, to within rounding.
COMPILED = ComputeConfig("auto", compile=True)


class Unsaid(TypedDict, total=False):
    """`ModelOverride` as keyword arguments."""

    vmin: float | None
    vmax: float | None
    simnorm_dim: int | None


@dataclass(frozen=True)
class ModelOverride(Checked):
    """Facts about a model that an original checkpoint does not contain; a folder contains them."""

    vmin: float | None = None  # of the bins, in symlog units; None: the published -10
    vmax: float | None = None  # None: the published 10
    simnorm_dim: int | None = None  # entries per simplex; None: the published 8

    def check_ranges(self) -> None:
        within(self, *SYMLOG, "vmin", "vmax")
        at_least(1, self, "simnorm_dim")

    def unsaid(self) -> Unsaid:
        return Unsaid(vmin=self.vmin, vmax=self.vmax, simnorm_dim=self.simnorm_dim)


@dataclass(frozen=True)
class BudgetOverride(Checked):
    """Changes of the checkpoint's planning budget, and how planning computes."""

    num_samples: int | None = None  # None: the checkpoint's
    iterations: int | None = None  # None: the checkpoint's
    num_elites: int | None = None  # None: the checkpoint's
    num_pi_trajs: int | None = None  # samples that follow the policy prior; None: the checkpoint's
    precision: str | None = None  # auto (bfloat16 where it is fast), float32, bfloat16; None: checkpoint's
    compile: bool = COMPILED.compile  # takes tens of seconds, once per machine

    def check_ranges(self) -> None:
        at_least(1, self, "num_samples", "iterations", "num_elites")
        at_least(0, self, "num_pi_trajs")
        if self.precision is not None:
            ComputeConfig(self.precision)

    def apply(self, planner: PlannerConfig) -> PlannerConfig:
        """`planner` with these changes; ConfigError if they do not fit it."""
        names = ("num_samples", "iterations", "num_elites", "num_pi_trajs")
        given = {name: getattr(self, name) for name in names}
        try:
            return replace(planner, **{name: n for name, n in given.items() if n is not None})
        except ConfigError as e:
            raise ConfigError(f"planner.{e}") from e


@dataclass(frozen=True)
class UpdateConfig(Checked):
    """One gradient step on the world model and the policy prior."""

    batch_size: int = 256
    lr: float = 3e-4
    enc_lr_scale: float = 0.3
    grad_clip_norm: float = 20.0
    tau: float = 0.01  # of the target networks and of the running Q scale
    rho: float = 0.5  # a loss t steps ahead has weight rho^t
    consistency_coef: float = 20.0
    reward_coef: float = 0.1
    value_coef: float = 0.1
    termination_coef: float = 1.0
    entropy_coef: float = 1e-4

    def check_ranges(self) -> None:
        within(self, 1, 1_000_000, "batch_size")
        within(self, 1e-12, 1, "lr", "tau")
        within(self, 0, 1, "rho")
        within(self, 0, 1000, "enc_lr_scale")
        within(self, 1e-12, 1e12, "grad_clip_norm")
        coefs = (f.name for f in fields(UpdateConfig) if f.name.endswith("_coef"))
        within(self, 0, 1e12, *coefs)


@dataclass(frozen=True)
class SpeculationConfig(Checked):
    """How a plan is executed. A mode is one value of this class.

    Naive open loop: `execution_horizon=3`. The policy prior alone: `execution_horizon=1, plan_length=0`: no
    step of a plan is used. With a corrector, the same is the corrector alone.
    """

    execution_horizon: int = 3  # K: steps executed per plan
    # Mismatch above which the agent replans, for steps in plan 1, 2, ...; the last holds for all later steps.
    threshold: tuple[float, ...] | None = None  # None: no fallback
    corrector: str = ""  # name of the corrector, for steps 1 .. K-1 (K=1: step 0); "": none
    refine_steps: int = 0  # steps that refining looks ahead; 0: no refining
    plan_length: int | None = None  # steps taken from a plan before the prior extends it; None: all H
    iterations: int | None = None  # of the planner; None: the teacher's

    def __post_init__(self) -> None:
        if isinstance(self.threshold, list):  # JSON turns tuples into lists
            object.__setattr__(self, "threshold", tuple(self.threshold))
        super().__post_init__()

    def check_ranges(self) -> None:
        within(self, 1, 1_000_000, "execution_horizon")
        within(self, 0, 100, "refine_steps", "plan_length")
        within(self, 1, 1000, "iterations")
        if self.threshold is not None and not self.threshold:
            raise ConfigError("threshold=(): must have a number for each step, or be null")

    def in_words(self) -> str:
        """The mode, e.g. `6 steps a plan, corrector two_tower, refined`."""
        steps = self.execution_horizon
        plans = "a new plan at every step" if steps == 1 else f"{steps} steps a plan"
        words = ["no plans" if self.plan_length == 0 else plans]
        if self.corrector:
            words.append(f"corrector {self.corrector}")
        if self.refine_steps:
            words.append("refined")
        return ", ".join(words)


TEACHER = SpeculationConfig(execution_horizon=1)  # TD-MPC2 itself: it replans at every step


@dataclass(frozen=True)
class CorrectorConfig(Checked):
    """Architecture of a corrector."""

    latent_dim: int
    action_dim: int
    architecture: str = "two_tower"  # or "temporal"
    width: int = 256
    window: int = 8  # W: steps of history that the temporal corrector sees
    num_layers: int = 2  # of the temporal corrector
    num_heads: int = 4
    max_k: int = 64  # steps in plan that have their own embedding

    def check_ranges(self) -> None:
        within(self, 1, 100_000, "latent_dim", "max_k")
        within(self, 1, 1000, "action_dim", "window", "num_heads")
        within(self, 1, 100, "num_layers")
        within(self, 8, 100_000, "width")
        if self.width % (2 * self.num_heads):
            raise ConfigError(
                f"width={self.width}: must be a multiple of twice the number of heads, {self.num_heads}"
            )


def published_budget(action_dim: int) -> PlannerConfig:
    """The published planning budget: two more iterations from 20 action dimensions on."""
    config = PlannerConfig()
    return replace(config, iterations=config.iterations + 2 * (action_dim >= 20))


def discount_of(episode_length: int) -> float:
    """Discount for episodes of `episode_length` agent steps (TD-MPC2's heuristic; 500 steps: 0.99)."""
    frac = episode_length / 5.0
    return min(max((frac - 1.0) / frac, 0.95), 0.995)
