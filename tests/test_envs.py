"""Environments: the same numbers as the simulators' own, and named errors for what goes wrong."""

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from tdmpc2.envs import (
    PadForModel,
    dmc,
    import_module,
    is_episodic,
    list_tasks,
    make_env,
    max_episode_steps,
)
from tdmpc2.errors import ConfigError, EnvironmentFailure, ObservationError, TaskError

suite = dmc.suite()


@pytest.fixture(scope="session")
def rendering() -> None:
    try:
        make_env("pendulum-swingup").render()
    except EnvironmentFailure as error:
        pytest.skip(str(error))


# dm_control


@pytest.mark.parametrize("domain, task", suite.ALL_TASKS)
def test_every_suite_task_has_its_published_and_its_full_name(domain: str, task: str) -> None:
    dashed = task.replace("_", "-")
    short = {"ball_in_cup": "cup", "point_mass": "pointmass"}.get(domain, domain)
    assert dmc.find(f"{domain}-{dashed}") == dmc.find(f"{short}-{dashed}") == (domain, task)
    assert f"{short}-{dashed}" in list_tasks()


@pytest.mark.parametrize("name", ["ball-in-cup-catch", "Cup-Catch", "ball_in_cup_catch"])
def test_spelling_of_a_name_is_forgiven(name: str) -> None:
    assert dmc.find(name) == ("ball_in_cup", "catch")


@pytest.mark.parametrize(
    "name, domain, task",
    [
        ("walker-walk", "walker", "walk"),  # orientations, height (a scalar), velocity: not sorted
        ("finger-turn-hard", "finger", "turn_hard"),
        ("quadruped-run", "quadruped", "run"),  # actuators with bounds other than [-1, 1]
        ("humanoid-walk", "humanoid", "walk"),
        ("fish-swim", "fish", "swim"),
        ("manipulator-bring-ball", "manipulator", "bring_ball"),
    ],
)
def test_numbers_are_those_of_two_raw_steps(name: str, domain: str, task: str) -> None:
    raw = suite.load(domain, task, task_kwargs={"random": 7})
    env = make_env(name, seed=7)
    spec = raw.action_spec()

    def flat(observation: dict[str, np.ndarray]) -> np.ndarray:
        return np.concatenate([np.atleast_1d(v).ravel() for v in observation.values()])

    step = raw.reset()
    obs, _ = env.reset()
    np.testing.assert_array_equal(obs, flat(step.observation).astype(np.float32))
    for _ in range(20):
        action = env.action_space.sample()
        scaled = spec.minimum + (action.astype(float) + 1) * (spec.maximum - spec.minimum) / 2
        rewards = []
        for _ in range(2):
            step = raw.step(scaled)
            rewards.append(step.reward)
        obs, reward, terminated, truncated, _ = env.step(action)
        np.testing.assert_allclose(obs, flat(step.observation), rtol=1e-4, atol=1e-5)
        assert reward == pytest.approx(sum(rewards), abs=1e-6)
        assert not terminated and not truncated
    assert obs.dtype == np.float32 and env.observation_space.contains(obs)
    assert env.action_space == gymnasium.spaces.Box(-1, 1, spec.shape, np.float32)


def test_order_of_the_observation_is_the_task_s() -> None:
    env = make_env("walker-walk")
    obs, _ = env.reset(seed=1)
    physics = env.unwrapped.physics  # type: ignore[attr-defined]
    np.testing.assert_array_equal(obs[:14], physics.orientations().astype(np.float32))
    assert obs[14] == np.float32(physics.torso_height())
    np.testing.assert_array_equal(obs[15:], physics.velocity().astype(np.float32))


def test_an_episode_has_500_steps_and_can_be_followed_by_another() -> None:
    env = make_env("cartpole-swingup")
    assert max_episode_steps(env) == 500 and not is_episodic(env)
    for _ in range(2):
        env.reset()
        for i in range(500):
            *_, terminated, truncated, _ = env.step(np.zeros(1, np.float32))
            assert not terminated and truncated == (i == 499)
        with pytest.raises(EnvironmentFailure, match="reset"):
            env.step(np.zeros(1, np.float32))


def test_lqr_terminates_where_the_task_says_so() -> None:
    env = make_env("lqr-lqr-2-1")
    env.reset(seed=0)
    assert is_episodic(env)
    env.unwrapped.task._TERMINAL_TOL = 10  # type: ignore[attr-defined]  # so near is near enough
    *_, terminated, truncated, _ = env.step(np.zeros(1, np.float32))
    assert terminated and not truncated


def episode(env: gymnasium.Env, seed: int | None, steps: int = 20) -> list[np.ndarray]:
    actions = np.random.default_rng(0).uniform(-1, 1, (steps, *env.action_space.shape))  # type: ignore[misc]
    obs = [env.reset(seed=seed)[0]]
    for action in actions.astype(np.float32):
        obs.append(env.step(action)[0])
    return obs


@pytest.mark.parametrize("task", ["cup-catch", "quadruped-escape", "lqr-lqr-6-2", "Ant-v5"])
def test_an_episode_is_a_function_of_its_seed(task: str) -> None:
    one, other = make_env(task, seed=1), make_env(task, seed=2)
    first, second = episode(one, None), episode(one, None)
    assert not np.array_equal(first, second)  # the stream goes on
    np.testing.assert_array_equal(episode(other, 1), first)
    np.testing.assert_array_equal(episode(other, None), second)
    np.testing.assert_array_equal(episode(one, 2), episode(make_env(task, seed=2), None))


# Pixels


def test_pixels_are_the_last_three_frames(rendering: None) -> None:
    env = make_env("cartpole-swingup", obs="rgb")
    obs, _ = env.reset(seed=0)
    assert obs.shape == (9, 64, 64) and obs.dtype == np.uint8
    physics = env.unwrapped.physics  # type: ignore[attr-defined]
    frames = [physics.render(64, 64, camera_id=0)]
    np.testing.assert_array_equal(obs, np.concatenate([frames[0].transpose(2, 0, 1)] * 3))
    for _ in range(3):
        obs = env.step(np.ones(1, np.float32))[0]
        frames.append(physics.render(64, 64, camera_id=0))
    assert not np.array_equal(frames[-1], frames[-2])
    np.testing.assert_array_equal(obs, np.concatenate([frame.transpose(2, 0, 1) for frame in frames[-3:]]))


def test_states_can_be_rendered_for_videos(rendering: None) -> None:
    env = make_env("walker-walk")
    env.reset()
    frame = env.render()
    assert frame.shape == (384, 384, 3) and frame.dtype == np.uint8  # type: ignore[union-attr]
    assert env.metadata["render_fps"] == 20


def test_failing_rendering_names_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("no\nOpenGL")

    env = make_env("walker-walk")
    monkeypatch.setattr(env.unwrapped.physics, "render", broken)  # type: ignore[attr-defined]
    with pytest.raises(EnvironmentFailure, match=r"(?s)MUJOCO_GL.*libegl1.*libosmesa6") as caught:
        env.render()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("backend, works", [("disabled", True), ("nonsense", False)])
def test_states_need_no_rendering_but_a_backend_that_exists(backend: str, works: bool) -> None:
    code = "from tdmpc2 import make_env; make_env('pendulum-swingup').reset()"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "MUJOCO_GL": backend, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert (done.returncode == 0) == works, done.stderr
    assert works or "MUJOCO_GL: nonsense" in done.stderr.splitlines()[-1]


def test_triton_is_imported_before_rendering_is_chosen(tmp_path: Path) -> None:
    """The other way round the process crashes, where Mesa renders in software."""
    (tmp_path / "triton.py").write_text("import sys; print('dm_control' in sys.modules)")
    done = subprocess.run(
        [sys.executable, "-c", "from tdmpc2.envs import dmc; dmc.suite()"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "False\n"


# Gymnasium


def test_hopper_terminates_and_is_otherwise_gymnasium_s_own() -> None:
    raw, env = gymnasium.make("Hopper-v5"), make_env("Hopper-v5", seed=3)
    assert max_episode_steps(env) == 1000 and is_episodic(env)
    obs, raw_obs = env.reset()[0], raw.reset(seed=3)[0]
    terminated = False
    for _ in range(200):
        np.testing.assert_array_equal(obs, raw_obs.astype(np.float32))
        action = env.action_space.sample()
        obs, reward, terminated, *_ = env.step(action)
        raw_obs, raw_reward, raw_terminated, *_ = raw.step(action)
        assert reward == raw_reward and terminated == raw_terminated
        if terminated:
            break
    assert terminated


@pytest.mark.parametrize("task", ["HalfCheetah-v5", "Reacher-v5", "Pusher-v5"])
def test_gymnasium_tasks_that_never_terminate(task: str) -> None:
    assert not is_episodic(make_env(task))


def test_actions_are_scaled_to_the_bounds() -> None:
    env = make_env("InvertedPendulum-v5")  # [-3, 3]
    env.reset(seed=0)
    env.step(np.array([-0.5], np.float32))
    assert env.unwrapped.data.ctrl[0] == -1.5  # type: ignore[attr-defined]


# Names


@pytest.mark.parametrize(
    "wrong, right",
    [
        ("walker-wlak", "walker-walk"),
        ("cup-cach", "cup-catch"),
        ("hopper-v5", "Hopper-v5"),
        ("Hopper-v9", "Hopper-v5"),
        ("BipedalWalker", "BipedalWalker-v3"),
        ("qqq", r"list_tasks\(\)"),
    ],
)
def test_a_wrong_name_gets_the_nearest_right_ones(wrong: str, right: str) -> None:
    with pytest.raises(TaskError, match=f"unknown task '{wrong}'; .*{right}"):
        make_env(wrong)


def test_without_dm_control_there_are_gymnasiums_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Above Python 3.12 pip installs dm_control only without its dependencies, so it may be missing."""
    monkeypatch.setattr(dmc, "is_installed", lambda: False)
    cached = dmc.tasks, dmc._normalised
    for function in cached:
        function.cache_clear()
    try:
        make_env("Pendulum-v1").close()
        with pytest.raises(TaskError, match="pip install --no-deps dm_control"):
            make_env("walker-walk")
    finally:
        for function in cached:
            function.cache_clear()


@pytest.mark.parametrize(
    "task, obs, error, message",
    [
        ("walker-walk", "pixels", ConfigError, "'state' or 'rgb'"),
        ("Hopper-v5", "rgb", TaskError, "dm_control tasks only"),
        ("CarRacing-v3", "state", TaskError, "images"),
        ("CartPole-v1", "state", TaskError, "Discrete actions; supported are"),
        ("FrozenLake-v1", "state", TaskError, "Discrete observations; supported are"),
        ("no_such_module:X-v0", "state", TaskError, "not imported.* task=... on the command line"),
        ("gymnasium:no_such_module:X-v0", "state", TaskError, "'gymnasium:no_such_module' is not imported"),
        ("gymnasium:", "state", EnvironmentFailure, "Malformed environment ID"),
        (None, "state", TaskError, "a task is a name"),
        ("gymnasium:NoSuch-v0", "state", TaskError, "NoSuch"),
    ],
)
def test_what_does_not_fit_is_refused(task: Any, obs: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        make_env(task, obs=obs)
    assert "\n" not in str(caught.value)


# A user's own environment

MODULE = """
import gymnasium
import numpy as np
from gymnasium.spaces import Box, Dict

class MyEnv(gymnasium.Env):
    observation_space = Box(-np.inf, np.inf, (2, 2), np.float64)
    action_space = Box(np.array([0.0, -2.0]), np.array([1.0, 6.0]), dtype=np.float64)
    at_step_3 = staticmethod(lambda obs: obs)
    reward = 1.0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.obs, self.steps = self.np_random.normal(size=(2, 2)), 0
        return self.obs, {}

    def step(self, action):
        assert self.action_space.contains(action), action
        self.steps += 1
        self.obs[0] = action  # one buffer for all observations
        obs = self.at_step_3(self.obs.copy()) if self.steps == 3 else self.obs
        return obs, self.reward, self.steps == 7, False, {}

"""


@pytest.fixture
def user_env(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Writes a module with an environment, changed by `body`, to the working directory, and imports it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(gymnasium.envs.registration, "registry", dict(gymnasium.registry))
    monkeypatch.delitem(sys.modules, "my_robot", raising=False)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def write(body: str = "", limit: str = ", max_episode_steps=10") -> str:
        register = f"gymnasium.register('MyEnv-v0', MyEnv{limit})\n"
        (tmp_path / "my_robot.py").write_text(MODULE + textwrap.dedent(body) + "\n" + register)
        import_module("my_robot:MyEnv-v0")
        return "my_robot:MyEnv-v0"

    return write


def test_a_user_s_own_environment(user_env: Callable[..., str]) -> None:
    env = make_env(user_env(), seed=5)
    assert max_episode_steps(env) == 10 and is_episodic(env)
    obs, _ = env.reset()
    np.testing.assert_array_equal(obs, make_env("my_robot:MyEnv-v0").reset(seed=5)[0])
    assert obs.shape == (4,) and obs.dtype == np.float32
    first = env.step(np.array([-1, 1], np.float32))[0]
    np.testing.assert_array_equal(first[:2], [0, 6])
    env.step(np.array([0, 0], np.float32))
    np.testing.assert_array_equal(first[:2], [0, 6])  # not overwritten by the next step
    terminated = [env.step(env.action_space.sample())[2] for _ in range(5)]
    assert terminated == [False] * 4 + [True]


@pytest.mark.parametrize(
    "body, error, message",
    [
        ("MyEnv.at_step_3 = lambda s, o: 1 / 0", EnvironmentFailure, "at step 3: ZeroDivision"),
        ("MyEnv.at_step_3 = lambda s, o: o * np.nan", ObservationError, "step 3 is nan"),
        ("MyEnv.at_step_3 = lambda s, o: o / 0", ObservationError, "step 3 is -?inf"),
        ("MyEnv.at_step_3 = lambda s, o: o[:1]", ObservationError, r"\[2\], expected .*\[4\]"),
        ("MyEnv.reward = float('nan')", EnvironmentFailure, "reward at step 1 is nan"),
        ("MyEnv.reward = None", EnvironmentFailure, "at step 1: TypeError"),
        ("MyEnv.reward = np.ones(2)", EnvironmentFailure, "at step 1: ValueError"),
        ("MyEnv.reward = 'much'", EnvironmentFailure, "at step 1: ValueError"),
        ("MyEnv.at_step_3 = lambda s, o: None", ObservationError, r"\[1\], expected .*\[4\]"),
        ("MyEnv.at_step_3 = lambda s, o: {'a': o}", EnvironmentFailure, "at step 3: TypeError"),
        ("MyEnv.at_step_3 = lambda s, o: o + 1e300", ObservationError, "step 3 is inf"),
        ("MyEnv.at_step_3 = lambda s, o: exit(0)", EnvironmentFailure, "at step 3: SystemExit"),
        ("MyEnv.step = lambda s, a: (s.obs, 1.0, False, {})", EnvironmentFailure, "step .*truncated, info"),
        ("MyEnv.step = lambda s, a: (s.obs, 1.0, s.obs, False, {})", EnvironmentFailure, "at step 1: Val"),
        ("MyEnv.reset = lambda *a, **k: np.ones((2, 2))", ObservationError, "at step 0"),
        ("MyEnv.reset = lambda s, **k: None", EnvironmentFailure, "at reset: TypeError"),
        ("MyEnv.close = lambda s: 1 / 0", EnvironmentFailure, "at close: ZeroDivision"),
        ("MyEnv.reset = lambda *a, **k: 1 / 0", EnvironmentFailure, "at reset: ZeroDivision"),
        ("MyEnv.__init__ = lambda s: 1 / 0", EnvironmentFailure, "cannot be built: ZeroDivision"),
        ("MyEnv.__init__ = lambda s: exit()", EnvironmentFailure, "cannot be built: SystemExit"),
        ("MyEnv.action_space = Box(-np.inf, 1, (2,))", TaskError, "no finite bounds; supported"),
        ("MyEnv.action_space = Box(-1, 1, (2,), np.int64)", TaskError, "int64 actions; supported"),
        ("MyEnv.action_space = Dict(a=Box(0, 1))", TaskError, "Dict actions; supported"),
        ("MyEnv.action_space = Box(-1, 1, (0,))", TaskError, "one is empty"),
        ("MyEnv.observation_space = Dict(a=Box(0, 1))", TaskError, "Dict observations; supported"),
        ("del MyEnv.observation_space", TaskError, "NoneType observations; supported"),
    ],
)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_what_goes_wrong_inside_comes_out_as_one_named_line(
    user_env: Callable[..., str], body: str, error: type[Exception], message: str
) -> None:
    task = user_env(body)
    with pytest.raises(error, match=message) as caught:
        env = make_env(task)
        env.reset()
        for _ in range(7):
            env.step(env.action_space.sample())
        env.close()
    assert task in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("body", ["raise SystemError('bad\\nimport')", "exit('bad import')"])
def test_a_module_that_cannot_be_imported(user_env: Callable[..., str], body: str) -> None:
    with pytest.raises(TaskError, match=r"cannot import 'my_robot' .*bad import") as caught:
        user_env(body)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["no_such_module:X", "my_robot.py:X", ":X", "..a:X", "a b:X", "a:b:X"])
def test_names_of_modules_that_there_are_not(user_env: Callable[..., str], name: str) -> None:
    user_env()
    with pytest.raises(TaskError, match="cannot import"):
        import_module(name)


def test_a_module_is_not_imported_by_the_name_of_a_task(user_env: Callable[..., str]) -> None:
    """A task may come out of a file that somebody else wrote."""
    user_env()
    for name in ("evil", "my_robot.evil"):
        Path("evil.py").write_text("open('evil-was-here', 'w')")
        with pytest.raises(TaskError, match=f"'{name}' is not imported"):
            make_env(f"{name}:MyEnv-v0")
    assert not Path("evil-was-here").exists()


@pytest.mark.parametrize("dtype", ["np.float64", "np.float32", "np.int16", "np.uint8"])
def test_observations_and_rewards_of_other_types_are_numbers_too(
    user_env: Callable[..., str], dtype: str
) -> None:
    space = f"MyEnv.observation_space = Box(0, 9, (2, 2), {dtype})"
    step = f"MyEnv.step = lambda s, a: ([[1, 2], [3, 4]], np.ones(1, {dtype}), np.array([True]), 0, {{}})"
    env = make_env(user_env(f"{space}\n{step}"))
    env.reset()
    obs, reward, terminated, truncated, _ = env.step(np.zeros(2, np.float32))
    assert obs.dtype == np.float32 and obs.tolist() == [1, 2, 3, 4]
    assert (reward, terminated, truncated) == (1.0, True, False)


@pytest.mark.parametrize("seed", [-1, 1.5, None, "x"])
def test_a_seed_is_a_whole_number(seed: Any) -> None:
    with pytest.raises(ConfigError, match=f"seed={seed}"):
        make_env("walker-walk", seed=seed)


# In the shapes of a multi-task model


def test_padding_adds_zeros_to_observations_and_ignores_what_an_action_has_too_much() -> None:
    plain, padded = make_env("cartpole-swingup"), PadForModel(make_env("cartpole-swingup"), 8, 3)
    assert padded.observation_space.shape == (8,) and padded.action_space.shape == (3,)
    assert max_episode_steps(padded) == 500
    own, obs = plain.reset(seed=1)[0], padded.reset(seed=1)[0]
    for extra in ([0.0, 0.0], [-1.0, 1.0]):
        assert obs.dtype == np.float32 and padded.observation_space.contains(obs)
        np.testing.assert_array_equal(obs, [*own, 0, 0, 0])
        own, reward, *_ = plain.step(np.array([0.5], np.float32))
        obs, padded_reward, *_ = padded.step(np.array([0.5, *extra], np.float32))
        assert padded_reward == reward


def test_a_user_s_environment_needs_a_time_limit(
    user_env: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    closes = "MyEnv.close = lambda self: print('closed')"
    with pytest.raises(TaskError, match="max_episode_steps"):
        make_env(user_env(closes, limit=""))
    assert capsys.readouterr().out == "closed\n", "it is closed when it is refused"


def test_a_simulation_that_blows_up_is_an_environment_failure() -> None:
    env = make_env("walker-walk")
    env.reset()
    env.step(np.zeros(6, np.float32))
    with pytest.raises(EnvironmentFailure, match=r"walker-walk: .* at step 2: PhysicsError"):
        env.step(np.full(6, np.nan, np.float32))
    env.reset()
    env.step(np.zeros(6, np.float32))


# Gymnasium's own judgement


@pytest.mark.parametrize(
    "task",
    [
        *("walker-walk", "cup-catch", "dog-run", "lqr-lqr-2-1"),
        *("Hopper-v5", "BipedalWalker-v3", "LunarLanderContinuous-v3"),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_gymnasium_s_check_env_passes(task: str) -> None:
    check_env(make_env(task), skip_render_check=True)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_gymnasium_s_check_env_passes_for_pixels(rendering: None) -> None:
    check_env(make_env("walker-walk", obs="rgb"), skip_render_check=True)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_gymnasium_s_check_env_passes_for_a_user_s(user_env: Callable[..., str]) -> None:
    check_env(make_env(user_env()), skip_render_check=True)
