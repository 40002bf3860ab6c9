"""The online trainer on a real simulator, with a tiny model and budget."""

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import tdmpc2
from tdmpc2 import cli
from tdmpc2 import config as tdmpc2_config
from tdmpc2.config import PlannerConfig
from tdmpc2.envs import dmc, import_module
from tdmpc2.errors import CheckpointError, ConfigError, TaskError, TDMPC2Error
from tdmpc2.files import read_json
from tdmpc2.training.trainer import TrainConfig, Trainer

ROOT = Path(__file__).parents[1]
TINY_MODEL = dict(enc_dim=16, mlp_dim=16, latent_dim=16, num_enc_layers=2, num_q=3)
TINY = dict(
    model_size=0, num_samples=8, num_elites=4, num_pi_trajs=2, iterations=1, batch_size=8,
    steps=140, seed_steps=30, eval_freq=60, eval_episodes=2, checkpoint_freq=50, seed=3,
    compile=False,
)  # fmt: skip
EPISODE = 20
# A real simulator with terminations and short episodes, registered as a user would do it.
SHORT_HOPPER = f"""
import gymnasium
from tdmpc2.config import MODEL_SIZES
MODEL_SIZES[0] = {TINY_MODEL!r}
hopper = "gymnasium.envs.mujoco.hopper_v5:HopperEnv"
gymnasium.register("Short-v0", hopper, max_episode_steps={EPISODE})
"""


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tdmpc2_config.MODEL_SIZES, 0, TINY_MODEL)
    monkeypatch.setattr(dmc, "EPISODE_STEPS", EPISODE)


def tiny_config(work_dir: Path, **changes) -> TrainConfig:
    return TrainConfig(**{"task": "cartpole-swingup", **TINY, "work_dir": str(work_dir), **changes})


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
    for name in ("train.csv", "eval.csv"):
        assert table(a / "teacher" / name) == table(b / "teacher" / name)
    x, y = (load_file(folder / "teacher/model.safetensors") for folder in (a, b))
    assert all(torch.equal(x[name], y[name]) for name in x)


class Killed(Exception):
    pass


def train_until(trainer: Trainer, step: int) -> None:
    def stop(trainer: Trainer) -> None:
        if trainer.step == step:
            raise Killed

    with pytest.raises(Killed):
        trainer.run(on_step=stop)


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
    assert (teacher / "train_config.json").exists()
    agent = tdmpc2.load_agent(teacher)
    obs, _ = tdmpc2.make_env("cartpole-swingup").reset(seed=0)
    assert agent.act(obs).shape == (1,)
    assert list((tmp_path / "run/tensorboard").iterdir())


def test_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    Trainer(tiny_config(tmp_path / "whole")).run()
    train_until(Trainer(tiny_config(tmp_path / "parts")), 25)  # before the first checkpoint
    train_until(Trainer(tiny_config(tmp_path / "parts", resume=True)), 75)
    trainer = Trainer(tiny_config(tmp_path / "parts", resume=True))
    assert trainer.step == 60
    train_until(trainer, 115)
    trainer = Trainer(tiny_config(tmp_path / "parts", resume=True))
    assert trainer.step == 100
    trainer.run()
    assert_equal_runs(tmp_path / "whole", tmp_path / "parts")


def test_longer_run_goes_on_from_a_finished_one(tmp_path: Path) -> None:
    Trainer(tiny_config(tmp_path, steps=60)).run()
    trainer = Trainer(tiny_config(tmp_path, steps=80, resume=True))
    assert trainer.step == 60
    trainer.run()
    assert [int(row["step"]) for row in table(tmp_path / "eval.csv")] == [60, 80]


def test_kill_9_and_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "short_hopper.py").write_text(SHORT_HOPPER)
    monkeypatch.syspath_prepend(tmp_path)
    task = "short_hopper:Short-v0"
    import_module(task)
    Trainer(tiny_config(tmp_path / "whole", task=task)).run()
    rows = table(tmp_path / "whole/train.csv")
    assert any(float(row["termination_loss"] or 0) > 0 for row in rows)

    settings = {**TINY, "task": task, "threads": 1, "work_dir": tmp_path / "parts", "resume": True}
    command = [sys.executable, str(ROOT / "scripts/train.py")]
    command += [f"{key}={value}" for key, value in settings.items()]
    env = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, env=env, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    train_csv = tmp_path / "parts/train.csv"
    checkpoint = tmp_path / "parts/checkpoint.safetensors"
    deadline = time.monotonic() + 60
    while not checkpoint.exists() or len(train_csv.read_text().splitlines()) < 5:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL

    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "going on from step" in done.stdout
    assert_equal_runs(tmp_path / "whole", tmp_path / "parts")


def test_an_existing_run_is_not_overwritten(tmp_path: Path) -> None:
    train_until(Trainer(tiny_config(tmp_path)), 10)
    with pytest.raises(ConfigError, match="already holds a run: add resume=true"):
        Trainer(tiny_config(tmp_path))


def test_nothing_is_deleted_that_a_run_did_not_leave(tmp_path: Path) -> None:
    """A run killed before its first checkpoint is begun anew; any other folder without one is refused."""
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
                Trainer(tiny_config(folder, resume=resume))
        assert (folder / name).read_text() == "precious"


def test_a_run_is_resumed_with_its_own_settings(tmp_path: Path) -> None:
    train_until(Trainer(tiny_config(tmp_path)), 70)
    with pytest.raises(ConfigError, match=r"has lr=0\.0003, not 0\.001"):
        Trainer(tiny_config(tmp_path, resume=True, lr=1e-3))
    checkpoint = tmp_path / "checkpoint.safetensors"
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="damaged"):
        Trainer(tiny_config(tmp_path, resume=True))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"task": "cartpole-swingupp"}, TaskError, "did you mean cartpole-swingup"),
        ({"model_size": 6}, ConfigError, "model_size=6: choose one of"),
        ({"obs": "pixels"}, ConfigError, "choose 'state' or 'rgb'"),
        ({"buffer_size": EPISODE}, ConfigError, "buffer_size=20: must hold an episode"),
        ({"eval_episodes": 0}, ConfigError, "eval_episodes=0"),
        ({"seed": -1}, ConfigError, "seed=-1"),
        ({"num_elites": 100}, ConfigError, "num_elites=100"),
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
    assert "task=... is required" in train("seed=1")
    assert "did you mean walker-walk" in train("task=walker-wallk")
    assert not (tmp_path / "run").exists()


def test_divergence_ends_the_run(tmp_path: Path) -> None:
    with pytest.raises(TDMPC2Error, match="training diverged"):
        Trainer(tiny_config(tmp_path, lr=1e30)).run()


def test_large_action_spaces_get_two_more_iterations(tmp_path: Path) -> None:
    def iterations(task: str, **changes) -> int:
        budget = {"iterations": PlannerConfig.iterations, **changes}
        return Trainer(tiny_config(tmp_path, task=task, **budget)).planner.iterations

    assert iterations("humanoid-stand") == 8
    assert iterations("humanoid-stand", iterations=4) == 4
    assert iterations("walker-walk") == 6
