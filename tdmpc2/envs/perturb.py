"""Perturbed worlds: pushes, noisy sensors, other masses, other friction.

An episode's perturbations depend on its seed alone, so all modes get the same.
"""

from typing import Any

import gymnasium
import mujoco
import numpy as np

from ..errors import ConfigError, TaskError
from .guard import Array, Env

PUSH_EVERY = 50  # agent steps from one push to the next, on average
PUSH_STEPS = 5  # agent steps that a push lasts
GRAVITY = 9.81  # m/s^2
KINDS = {
    "push": "force on a random body, in units of the weight of all moving bodies",
    "obs_noise": "standard deviation of noise on every entry of an observation",
    "mass": "factor on masses and inertias",
    "friction": "factor on sliding friction",
}


class Perturbed(gymnasium.Wrapper[Array, Array, Array, Array]):
    """A MuJoCo environment from `make_env` under one perturbation.

    Args:
        env: the environment; its model is changed permanently.
        kind: one of KINDS.
        strength: in the unit of KINDS.

    Raises:
        ConfigError: there is no such kind, or the strength is invalid.
        TaskError: the environment does not use MuJoCo, observes pixels, or has no contacts (`friction`) or no
            moving bodies (`push`).
    """

    def __init__(self, env: Env, kind: str, strength: float) -> None:
        super().__init__(env)
        if kind not in KINDS or not 0 <= strength < np.inf:
            raise ConfigError(f"perturbation {kind} {strength}: choose one of {', '.join(KINDS)}, at least 0")
        if kind == "mass" and not strength:
            raise ConfigError(f"perturbation {kind} {strength}: must be above 0")
        if env.observation_space.dtype != np.float32:
            raise TaskError("perturbations exist for states, not for pixels")
        base: Any = env.unwrapped
        simulation = getattr(base, "physics", base)
        parts: list[Any] = [getattr(simulation, name, None) for name in ("model", "data")]
        model, data = (getattr(part, "ptr", part) for part in parts)  # without dm_control's wrapper
        if not (isinstance(model, mujoco.MjModel) and isinstance(data, mujoco.MjData)):
            raise TaskError(f"{env.get_wrapper_attr('task')}: only MuJoCo tasks can be perturbed")
        self._model, self._data = parts
        self.kind, self.strength = kind, strength
        if kind == "mass":
            self._model.body_mass[:] *= strength
            self._model.body_inertia[:] *= strength
            # MuJoCo derives constants from masses, such as subtree masses, which some rewards use.
            mujoco.mj_setConst(model, data)
        elif kind == "friction":
            if self._model.opt.disableflags & mujoco.mjtDisableBit.mjDSBL_CONTACT:
                raise TaskError(f"{env.get_wrapper_attr('task')}: no contacts, so no friction")
            self._model.geom_friction[:, 0] *= strength
        # Massless bodies and the world body cannot be pushed.
        masses, joints = np.array(self._model.body_mass), np.array(self._model.body_dofnum)
        self._bodies = np.flatnonzero((masses > 0) & (joints > 0))
        if kind == "push" and not self._bodies.size:
            raise TaskError(f"{env.get_wrapper_attr('task')}: no body can be pushed")
        self._weight = GRAVITY * masses[self._bodies].sum()
        self._rng = np.random.default_rng(0)
        self._push_ends = 0  # remaining steps of the current push

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Array, dict[str, Any]]:
        if seed is not None:
            self._rng = np.random.default_rng([seed, 1])
        self._stop_push()
        obs, info = self.env.reset(seed=seed, options=options)
        return self._seen(obs), info

    def step(self, action: Array) -> tuple[Array, float, bool, bool, dict[str, Any]]:
        if self.kind == "push":
            self._push()
        obs, reward, terminated, truncated, info = self.env.step(action)
        return self._seen(obs), float(reward), terminated, truncated, info

    def _push(self) -> None:
        """Begin, continue or end a push. The random numbers do not depend on the episode's course."""
        begins, body = self._rng.random() < 1 / PUSH_EVERY, self._rng.choice(self._bodies)
        direction = self._rng.normal(size=3)
        if begins:
            self._stop_push()
            force = self.strength * self._weight * direction / np.linalg.norm(direction)
            self._data.xfrc_applied[body, :3] = force
            self._push_ends = PUSH_STEPS
        elif self._push_ends:
            self._push_ends -= 1
            if not self._push_ends:
                self._stop_push()

    def _stop_push(self) -> None:
        self._data.xfrc_applied[:] = 0.0
        self._push_ends = 0

    def _seen(self, obs: Array) -> Array:
        if self.kind != "obs_noise":
            return obs
        return (obs + self.strength * self._rng.normal(size=obs.shape)).astype(np.float32)
