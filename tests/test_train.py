"""The online trainer on a real simulator, with a tiny model and budget."""

import csv
import io
import os
import shutil
import signal
import subprocess
import sys
import time
import types
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partialmethod
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box
from rich.console import Console
from safetensors.torch import load_file
from stand_ins import nested

import tdmpc2
from tdmpc2 import cli
from tdmpc2 import config as tdmpc2_config
from tdmpc2.checked import from_json
from tdmpc2.config import PlannerConfig
from tdmpc2.envs import dmc, import_module
from tdmpc2.errors import CheckpointError, ConfigError, DataError, TaskError, TDMPC2Error
from tdmpc2.files import in_use, read_json, read_tensors, write_tensors
from tdmpc2.progress import Progress
from tdmpc2.training import trainer as trainer_module
from tdmpc2.training.checkpoint import FORMAT
from tdmpc2.training.log import Log
from tdmpc2.training.trainer import TrainConfig, Trainer, TrainPlannerConfig

ROOT = Path(__file__).parents[1]
TINY_MODEL = dict(enc_dim=16, mlp_dim=16, latent_dim=16, num_enc_layers=2, num_q=3)
TINY = {
    "model_size": 0,
    "steps": 140,
    "seed_steps": 30,
    "checkpoint_freq": 50,
    "seed": 3,
    "planner.num_samples": 8,
    "planner.num_elites": 4,
    "planner.num_pi_trajs": 2,
    "planner.iterations": 1,
    "planner.compile": False,
    "update.batch_size": 8,
    "evaluation.freq": 60,
    "evaluation.episodes": 2,
}
EPISODE = 20
# A real simulator with terminations and short episodes, registered as a user would do it.
SHORT_HOPPER = f"""
import gymnasium
from tdmpc2.config import MODEL_SIZES
MODEL_SIZES[0] = {TINY_MODEL!r}
hopper = "gymnasium.envs.mujoco.hopper_v5:HopperEnv"
gymnasium.register("Short-v0", hopper, max_episode_steps={EPISODE})
"""


class Scripted(gymnasium.Env):
    """Ends after so many steps, by a termination or cut off, with the same reward in each."""

    observation_space = Box(-9, 9, (2,), np.float32)
    action_space = Box(-1, 1, (1,), np.float32)

    def __init__(self, steps: int, terminates: bool, reward: float = 1.0):
        self.steps, self.terminates, self.reward = steps, terminates, reward

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return self.np_random.normal(size=2).astype(np.float32), {}

    def step(self, action):
        self.t += 1
        over = self.t == self.steps
        obs = self.np_random.normal(size=2).astype(np.float32)
        return obs, self.reward, over and self.terminates, over and not self.terminates, {}


for name, kwargs in {
    "Fails-v0": dict(steps=2, terminates=True),
    "CutOff-v0": dict(steps=2, terminates=False),
    "Pays-v0": dict(steps=10, terminates=False),
    "Costs-v0": dict(steps=10, terminates=False, reward=-50_000.0),
}.items():
    gymnasium.register(name, entry_point=Scripted, max_episode_steps=EPISODE, kwargs=kwargs)
gymnasium.register(
    "Reach-v0", entry_point=Scripted, max_episode_steps=1, kwargs=dict(steps=1, terminates=True)
)


@pytest.fixture(autouse=True, scope="module")
def tiny() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tdmpc2_config.MODEL_SIZES, 0, TINY_MODEL)
        patch.setattr(dmc, "EPISODE_STEPS", EPISODE)
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was never interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    resumable(folder).run()
    return folder


def tiny_config(work_dir: Path, **changes) -> TrainConfig:
    """Settings of a short run; `evaluation__freq` is the setting `evaluation.freq`."""
    own = {name.replace("__", "."): value for name, value in changes.items()}
    settings = {"task": "cartpole-swingup", **TINY, "work_dir": str(work_dir), **own}
    return from_json(TrainConfig, nested(settings))


def table(path: Path) -> list[dict[str, str]]:
    """A table without its times, the only column that may differ between equal runs."""
    with open(path, newline="") as file:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]


def assert_equal_runs(a: Path, b: Path) -> None:
    for name in ("train.csv", "eval.csv"):
        assert table(a / name) == table(b / name), name
    x, y = (load_file(folder / "checkpoint.safetensors") for folder in (a, b))
    assert x.keys() == y.keys()
    assert all(torch.equal(x[name], y[name]) for name in x)
    shards = sorted(path.name for path in (a / "replay").iterdir())
    assert shards == sorted(path.name for path in (b / "replay").iterdir())
    for name in shards:
        assert (a / "replay" / name).read_bytes() == (b / "replay" / name).read_bytes(), name
    for name in ("train.csv", "eval.csv"):
        assert table(a / "teacher" / name) == table(b / "teacher" / name)
    x, y = (load_file(folder / "teacher/model.safetensors") for folder in (a, b))
    assert all(torch.equal(x[name], y[name]) for name in x)


def said(trainer: Trainer, **kwargs) -> list[str]:
    """What a run reports, whatever it ends in."""
    lines: list[str] = []
    try:
        trainer.run(report=lines.append, **kwargs)
    except TDMPC2Error as e:
        lines.append(str(e))
    return lines


def resumable(folder: Path) -> Trainer:
    return Trainer(tiny_config(folder, steps=100, evaluation__freq=80, checkpoint_freq=40, resume=True))


class Killed(BaseException):
    pass


def train_until(trainer: Trainer, step: int) -> list[str]:
    """End a run in the middle of an episode; returns what it reported."""
    lines: list[str] = []

    def stop(trainer: Trainer) -> None:
        if trainer.step == step:
            raise Killed

    with pytest.raises(Killed):
        trainer.run(on_step=stop, report=lines.append)
    return lines


def test_a_run_and_what_it_leaves(tmp_path: Path) -> None:
    trainer = Trainer(tiny_config(tmp_path / "run"))
    teacher = trainer.run()
    rows = table(tmp_path / "run/train.csv")
    assert [int(row["step"]) for row in rows] == list(range(20, 141, 20))
    # Seeding ends at step 30; the 30 updates missed are made up for, then one follows every step.
    assert [bool(row["total_loss"]) for row in rows] == [False] + [True] * 6
    assert trainer.updates == 30 + (140 - 31)
    assert all(float(row["return"]) >= 0 for row in rows)
    curve = table(teacher / "eval.csv")
    assert [int(row["step"]) for row in curve] == [60, 120, 140]
    best = max(float(row["mean"]) for row in curve)
    saved = read_json(teacher / "config.json")
    assert saved["eval_return"] == best == trainer.best_return
    assert saved["planner"]["num_samples"] == 8 and saved["discount"] == trainer.discount
    assert from_json(TrainConfig, read_json(teacher / "train_config.json")) == trainer.config
    agent = tdmpc2.load_agent(teacher, compute=tdmpc2_config.EAGER)
    obs, _ = tdmpc2.make_env("cartpole-swingup").reset(seed=0)
    assert agent.act(obs).shape == (1,)
    assert list((tmp_path / "run/tensorboard").iterdir())


@pytest.mark.parametrize("save_every", [0, 1e9])  # after every episode; as seldom as can be
def test_resumed_equals_uninterrupted(
    tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, save_every: float
) -> None:
    monkeypatch.setattr(trainer_module, "SAVE_EVERY", save_every)

    def part(step: int) -> list[str]:
        return train_until(resumable(tmp_path), step)

    assert part(15) == ["stopped at step 15; nothing is saved yet"]
    assert part(35) == ["stopped at step 35; resume=true continues from step 20"]  # the first episode's end
    saved = 40 if save_every else 60  # 40: checkpoint_freq
    assert part(75) == [
        "resuming from step 20",
        f"stopped at step 75; resume=true continues from step {saved}",
    ]
    first, *_, last = part(95)
    assert first == f"resuming from step {saved}"
    assert last == "stopped at step 95; resume=true continues from step 80"  # after the evaluation
    assert resumable(tmp_path).run() == tmp_path / "teacher"
    assert_equal_runs(whole, tmp_path)


def test_an_evaluation_that_is_interrupted_is_made_again(
    tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for when in ("_evaluate", "_export", "_copy_tables"):

        def interrupted(self: Trainer, original: Callable[[Trainer], object]) -> None:
            original(self)
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(Trainer, when, partialmethod(interrupted, getattr(Trainer, when)))
            with pytest.raises(KeyboardInterrupt):
                resumable(tmp_path).run()
    resumable(tmp_path).run()
    assert_equal_runs(whole, tmp_path)


def test_what_was_learnt_is_saved_before_an_evaluation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(self: Trainer) -> None:
        raise Killed

    monkeypatch.setattr(trainer_module, "SAVE_EVERY", 1e9)
    monkeypatch.setattr(Trainer, "_evaluate", interrupted)
    lines: list[str] = []
    with pytest.raises(Killed):
        Trainer(tiny_config(tmp_path, steps=60, checkpoint_freq=1000)).run(report=lines.append)
    assert lines == ["stopped at step 60; resume=true continues from step 60"]


def test_a_run_that_is_killed_while_it_saves_goes_on(
    tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for when in ("save_state", "write_json"):  # after the shard, before the checkpoint; the first write

        def killed(*args: object) -> None:
            raise Killed

        with monkeypatch.context() as patch:
            patch.setattr(trainer_module, when, killed)
            with pytest.raises(Killed):
                resumable(tmp_path).run()
    resumable(tmp_path).run()
    assert_equal_runs(whole, tmp_path)


def test_what_a_kill_during_the_first_write_leaves_is_no_hindrance(tmp_path: Path) -> None:
    for name in (".lock", ".train_config.json.0123456789ab.tmp"):
        (tmp_path / name).touch()
    train_until(Trainer(tiny_config(tmp_path)), 10)


def test_longer_run_goes_on_from_a_finished_one(tmp_path: Path) -> None:
    Trainer(tiny_config(tmp_path / "run", steps=60)).run()
    shutil.move(tmp_path / "run", tmp_path / "moved")
    lines = said(Trainer(tiny_config(tmp_path / "moved/../moved/", steps=80, resume=True)))
    assert lines[0] == "resuming from step 60"
    assert [int(row["step"]) for row in table(tmp_path / "moved/eval.csv")] == [60, 80]


def test_one_process_at_a_time(tmp_path: Path) -> None:
    train_until(Trainer(tiny_config(tmp_path)), 30)
    with in_use(tmp_path):
        before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
        assert "is in use by another process" in said(Trainer(tiny_config(tmp_path, resume=True)))[0]
        assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}


def test_kill_and_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "short_hopper.py").write_text(SHORT_HOPPER)
    monkeypatch.syspath_prepend(tmp_path)
    task = "short_hopper:Short-v0"
    import_module(task)
    Trainer(tiny_config(tmp_path / "whole", task=task)).run()
    rows = table(tmp_path / "whole/train.csv")
    assert any(float(row["termination_loss"] or 0) > 0 for row in rows)

    settings = {**TINY, "task": task, "threads": 1, "work_dir": tmp_path / "parts", "resume": True}
    command = [sys.executable, "-m", "tdmpc2", "train"]
    command += [f"{key}={value}" for key, value in settings.items()]
    env = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}", "OMP_NUM_THREADS": "1"}
    train_csv, checkpoint = (tmp_path / "parts" / name for name in ("train.csv", "checkpoint.safetensors"))
    deadline = time.monotonic() + 300
    for stop, rows_before, status in ((signal.SIGTERM, 2, 128 + signal.SIGTERM), (signal.SIGKILL, 5, -9)):
        process = subprocess.Popen(
            command, env=env, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        while not checkpoint.exists() or len(train_csv.read_text().splitlines()) < rows_before:
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()
            time.sleep(0.01)
        process.send_signal(stop)
        output, _ = process.communicate()
        assert process.returncode == status, output
        assert stop == signal.SIGKILL or "; resume=true continues from step " in output

    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "resuming from step" in done.stdout
    assert_equal_runs(tmp_path / "whole", tmp_path / "parts")


def test_an_existing_run_is_not_overwritten(tmp_path: Path) -> None:
    train_until(Trainer(tiny_config(tmp_path)), 30)
    with pytest.raises(ConfigError, match="already holds a run: add resume=true"):
        Trainer(tiny_config(tmp_path)).run()


def test_nothing_is_deleted_that_a_run_did_not_leave(tmp_path: Path) -> None:
    """A run killed before its first checkpoint is begun anew; any other folder without one is refused."""
    train_until(Trainer(tiny_config(tmp_path / "killed")), 10)
    train_until(Trainer(tiny_config(tmp_path / "killed")), 10)
    train_until(Trainer(tiny_config(tmp_path / "killed", resume=True)), 10)
    foreign = ("teacher", "replay", "train.csv", "notes.txt")
    # A teacher's own folder has the settings of the run that it came from.
    for name, run_of_ours in (("teacher", True), ("model.safetensors", True), *((n, False) for n in foreign)):
        folder = tmp_path / f"{name}-{run_of_ours}"
        folder.mkdir()
        (folder / name).write_text("precious")
        if run_of_ours:
            (folder / "train_config.json").write_text("{}")
        for resume in (True, False):
            with pytest.raises(ConfigError, match=str(folder)):
                Trainer(tiny_config(folder, resume=resume)).run()
        assert (folder / name).read_text() == "precious"
    train_until(Trainer(tiny_config(tmp_path / "lost")), 45)
    (tmp_path / "lost/checkpoint.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"holds train\.csv and no run to resume"):
        Trainer(tiny_config(tmp_path / "lost", resume=True)).run()
    assert len(table(tmp_path / "lost/train.csv")) == 2


def test_what_cannot_be_gone_on_from_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, folder = tmp_path / "whole", tmp_path / "run"
    train_until(Trainer(tiny_config(whole)), 70)

    def refused(
        damage: Callable[[Path], object], error: type[TDMPC2Error], message: str, **changes: object
    ) -> None:
        shutil.copytree(whole, folder)
        damage(folder)
        with pytest.raises(error, match=message) as e:
            Trainer(tiny_config(folder, resume=True, **changes)).run()
        assert "\n" not in str(e.value)
        shutil.rmtree(folder)

    def rewrite(
        tensors: dict[str, torch.Tensor | None] | None = None, **loop: object
    ) -> Callable[[Path], None]:
        def write(folder: Path) -> None:
            path = folder / "checkpoint.safetensors"
            held, about = read_tensors(path, FORMAT, "", CheckpointError)
            held = {name: t for name, t in (held | (tensors or {})).items() if t is not None}
            write_tensors(path, held, about | {"loop": about["loop"] | loop})

        return write

    def flip(folder: Path) -> None:
        content = bytearray((folder / "checkpoint.safetensors").read_bytes())
        content[-1000] ^= 1
        (folder / "checkpoint.safetensors").write_bytes(content)

    def cut(name: str, size: int) -> Callable[[Path], None]:
        return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size])

    def as_before(folder: Path) -> None:
        pass

    refused(as_before, ConfigError, r"has update\.lr=0\.0003, not 0\.001", update__lr=1e-3)
    refused(as_before, ConfigError, r"has model\.vmax=10\.0, not 12\.0", model__vmax=12.0)
    refused(cut("checkpoint.safetensors", 1000), CheckpointError, "damaged")
    refused(cut("checkpoint.safetensors", -8), CheckpointError, "damaged")
    refused(cut("train.csv", 100), DataError, r"train\.csv has lost rows")
    refused(flip, CheckpointError, "its contents have changed")
    refused(lambda folder: shutil.rmtree(folder / "teacher"), CheckpointError, "teacher.* is missing")
    refused(lambda folder: next((folder / "replay").glob("0*0.*")).unlink(), DataError, "incomplete")
    q_scale = torch.zeros((), dtype=torch.float64)
    refused(rewrite({"q_scale": q_scale}), CheckpointError, r"q_scale is torch\.float64 \[\], not")
    refused(rewrite({"q_scale": None}), CheckpointError, "q_scale is missing")
    moment = "model_optim/0/exp_avg"
    refused(rewrite({moment: torch.zeros(3)}), CheckpointError, f"{moment} is torch.float32 .3., not")
    refused(rewrite(step="x"), CheckpointError, "holds step=x")
    refused(rewrite(episode=-1), CheckpointError, "holds episode=-1")
    refused(rewrite(more=1), CheckpointError, "lacks the state of the run")
    monkeypatch.setattr(Scripted, "observation_space", Box(-9, 9, (3,), np.float32))
    refused(
        rewrite(config=asdict(tiny_config(folder, task="Fails-v0"))),
        CheckpointError,
        "of another model: "
        r".*has the environment changed\?",
        task="Fails-v0",
    )


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"task": "cartpole-swingupp"}, TaskError, "did you mean cartpole-swingup"),
        ({"model_size": 6}, ConfigError, "model_size=6: choose one of"),
        ({"obs": "pixels"}, ConfigError, "choose 'state' or 'rgb'"),
        ({"buffer_size": EPISODE}, ConfigError, "buffer_size=20: must hold an episode"),
        (
            {"obs": "rgb", "steps": 10**9, "buffer_size": 10**9},
            ConfigError,
            r"36\d{3}\.\d GB.* set buffer_size=",
        ),
        ({"evaluation.episodes": 0}, ConfigError, r"^evaluation\.episodes=0"),
        ({"evaluation.freq": 0}, ConfigError, r"^evaluation\.freq=0"),
        ({"checkpoint_freq": 0}, ConfigError, "checkpoint_freq=0"),
        ({"seed": -1}, ConfigError, "seed=-1"),
        ({"seed_steps": -5}, ConfigError, "seed_steps=-5"),
        ({"threads": 0}, ConfigError, "threads=0"),
        ({"steps": 30}, ConfigError, "steps=30: nothing would be learned.* seed_steps=30"),
        ({"task": "Reach-v0"}, ConfigError, r"last at most 1 steps: set planner\.horizon=1"),
        ({"seed_steps": 0, "steps": EPISODE}, TDMPC2Error, "nothing was learned in 20 steps"),
        ({"planner.num_elites": 100}, ConfigError, r"^planner\.num_elites=100"),
        ({"device": "gpu"}, ConfigError, "device=gpu"),
        ({"wandb_project": "x"}, ConfigError, "pip install wandb"),
    ],
)
def test_bad_settings(tmp_path: Path, monkeypatch, changes, error, message) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    with pytest.raises(error, match=message) as e:
        Trainer(tiny_config(tmp_path / "run", **changes)).run()
    assert "\n" not in str(e.value)
    assert not (tmp_path / "run/checkpoint.safetensors").exists()


def test_command_line(tmp_path: Path, monkeypatch, capsys) -> None:
    def train(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["train.py", *arguments, f"work_dir={tmp_path / 'run'}"])
        with pytest.raises(SystemExit) as end:
            cli.run(TrainConfig, lambda config: Trainer(config).run())
        assert end.value.code == 1
        return capsys.readouterr().err

    assert "model_size" in train("task=walker-walk", "modelsize=5")
    assert "did you mean update.batch_size?" in train("task=walker-walk", "batch_size=5")
    assert "task=... is required" in train("seed=1")
    assert "did you mean walker-walk" in train("task=walker-wallk")
    assert not (tmp_path / "run").exists()


def test_divergence_ends_the_run(tmp_path: Path) -> None:
    def spoil(trainer: Trainer) -> None:
        with torch.no_grad():
            trainer.update.model_params[-1].fill_(torch.nan)

    with pytest.raises(TDMPC2Error, match="training diverged at step 31"):
        Trainer(tiny_config(tmp_path)).run(on_step=spoil)


def test_failures_within_the_horizon_are_learnt(tmp_path: Path) -> None:
    trainer = Trainer(tiny_config(tmp_path, task="Fails-v0", steps=60))
    lines = said(trainer)
    assert trainer.updates == 30 + (60 - 31)
    assert not any("cut off" in line for line in lines)
    rows = table(tmp_path / "train.csv")
    assert {row["length"] for row in rows} == {"2"}
    first, last = (float(rows[i]["termination_loss"]) for i in (15, -1))
    assert 0 < last < first


def test_episodes_of_one_step_are_learnt_with_a_horizon_of_one(tmp_path: Path) -> None:
    trainer = Trainer(tiny_config(tmp_path, task="Reach-v0", planner__horizon=1, steps=60))
    trainer.run()
    assert trainer.updates == 30 + (60 - 31)


def test_episodes_that_are_cut_off_within_the_horizon_are_mentioned(tmp_path: Path) -> None:
    lines = said(Trainer(tiny_config(tmp_path, task="CutOff-v0")))
    assert sum("episodes shorter than planner.horizon=3" in line for line in lines) == 1
    assert "none of the 16 episodes so far lasted planner.horizon=3 steps" in lines[-1]
    assert lines[-2].startswith("stopped at step 32")


def test_rewards_beyond_the_bins_are_mentioned_once(tmp_path: Path) -> None:
    config = dict(task="Costs-v0", seed_steps=12, steps=30, evaluation__freq=30)
    mentioned = [line for line in said(Trainer(tiny_config(tmp_path / "a", **config))) if "scale" in line]
    assert len(mentioned) == 1
    assert "-50,000 to 0" in mentioned[0] and "-22,025 to 22,025" in mentioned[0]
    assert mentioned[0].endswith("model.vmin=-14 model.vmax=10")
    trainer = Trainer(tiny_config(tmp_path / "b", model__vmin=-14.0, **config))
    assert not any("scale" in line for line in said(trainer))
    assert read_json(tmp_path / "b/teacher/config.json")["world_model"]["vmin"] == -14.0


def test_values_beyond_the_bins_are_mentioned(tmp_path: Path) -> None:
    """The bins reach to 1.01, which is enough for rewards of 1, but not for what follows."""
    config = dict(task="Pays-v0", model__vmin=-0.7, model__vmax=0.7, update__lr=0.01, evaluation__freq=140)
    lines = said(Trainer(tiny_config(tmp_path, **config)))
    (mentioned,) = (line for line in lines if "scale" in line)
    assert int(mentioned.split()[1].rstrip(":")) > 30, "before a value was learnt"


def test_default_folders_have_no_colon() -> None:
    planner = TrainPlannerConfig(horizon=1, compile=False)
    config = TrainConfig(task="gymnasium:Reach-v0", model_size=0, planner=planner)
    assert str(Trainer(config).folder) == "runs/gymnasium-Reach-v0/1"


def test_wandb_ids_have_allowed_characters_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = []

    def init(*, id: str, **settings: object) -> types.SimpleNamespace:  # noqa: A002
        ids.append(id)
        return types.SimpleNamespace(log=lambda *a, **k: None, finish=lambda **k: None)

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    for folder in ("a:b", "c d, e#?'x", "ä" * 70):
        (tmp_path / folder).mkdir()
        with Log(tmp_path / folder, {"train": ("step", "return")}, wandb_project="demo") as log:
            log.write("train", {"step": 1, "return": 0.0})
    assert not set("".join(ids)) & set(":;,#?/'") and all(len(i) <= 64 for i in ids)
    assert ids[0].endswith("-a-b")


def test_wandb_that_does_not_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def init(**settings: object) -> None:
        raise RuntimeError("api_key not configured\n(no-tty)")

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    lines = said(Trainer(tiny_config(tmp_path, wandb_project="demo")))
    assert lines == ["wandb_project=demo: W&B does not start (RuntimeError: api_key not configured (no-tty))"]
    train_until(Trainer(tiny_config(tmp_path)), 10)  # the folder is free


def test_every_stage_shows_itself_where_there_is_no_terminal(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=80)
    with Progress(console) as progress:
        Trainer(tiny_config(tmp_path, steps=60)).run(progress)
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert [line.split(",")[0] for line in lines] == [
        "training: 0 of 60 steps",
        "pretraining: 0 of 30 updates",
        "pretraining: 30 of 30 updates",
        "evaluating: 0 of 20 steps",
        "evaluating: 20 of 20 steps",
        lines[5].split(",")[0],
        "training: 60 of 60 steps",
    ]
    evaluation = table(tmp_path / "eval.csv")[0]["mean"]
    assert lines[5].startswith(f"step 60: evaluation {float(evaluation):.1f} ")
    returns = [float(row["return"]) for row in table(tmp_path / "train.csv")]
    assert f"return {returns[-1]:.1f}, evaluation {float(evaluation):.1f}" in lines[-1]


def test_large_action_spaces_get_two_more_iterations(tmp_path: Path) -> None:
    def iterations(task: str, **changes) -> int:
        budget = {"planner__iterations": PlannerConfig.iterations, **changes}
        return Trainer(tiny_config(tmp_path, task=task, **budget)).planner.iterations

    assert iterations("humanoid-stand") == 8
    assert iterations("humanoid-stand", planner__iterations=4) == 4
    assert iterations("walker-walk") == 6
