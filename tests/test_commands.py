"""The command `tdmpc2`: its verbs, and those that have no other test."""

import runpy
import sys
from pathlib import Path

import gymnasium as gym
import imageio_ffmpeg
import numpy as np
import pytest
from gymnasium.spaces import Box
from PIL import Image

from tdmpc2 import commands
from tdmpc2.commands import play
from tdmpc2.config import EAGER, PlannerConfig
from tdmpc2.envs import list_tasks
from tdmpc2.files import read_json, write_json
from tdmpc2.version import __version__
from tdmpc2.world_model import load_world_model, save_world_model

TEACHER = Path(__file__).parent / "fixtures/official/state_small.pt"
SCRIPTS = Path(__file__).parents[1] / "scripts"
STEPS = 6


class Seen(gym.Env):
    """Six steps of a world that can be rendered; the picture brightens from step to step."""

    observation_space = Box(-np.inf, np.inf, (24,), np.float32)
    action_space = Box(-1.0, 1.0, (6,), np.float32)
    metadata = {"render_modes": ["rgb_array"], "render_fps": 50}  # noqa: RUF012
    render_mode = "rgb_array"

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return self.np_random.normal(size=24).astype(np.float32), {}

    def step(self, action):
        self.t += 1
        return self.np_random.normal(size=24).astype(np.float32), 1.0, False, False, {}

    def render(self):
        return np.full((40, 40, 3), 40 * self.t, np.uint8)


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    gym.register("Seen-v0", entry_point=Seen, max_episode_steps=STEPS)
    budget = PlannerConfig(num_samples=16, iterations=1, num_elites=4, num_pi_trajs=4)
    save_world_model(
        tmp_path / "teacher",
        load_world_model(TEACHER),
        task="Seen-v0",
        discount=0.95,
        planner=vars(budget),
        precision=EAGER.precision,
    )
    yield tmp_path / "teacher"
    del gym.registry["Seen-v0"]


def tdmpc2(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["tdmpc2", *map(str, arguments)])
    commands.main()


def test_help_names_every_verb(monkeypatch, capsys) -> None:
    for arguments in ([], ["--help"], ["help"]):
        tdmpc2(monkeypatch, *arguments)
        out = capsys.readouterr().out
        assert [verb for verb in commands.VERBS if f"\n  {verb} " not in out] == []
    for verb in commands.VERBS:
        tdmpc2(monkeypatch, verb, "--help")
        assert capsys.readouterr().out.startswith(f"tdmpc2 {verb} key=value")


@pytest.mark.parametrize("path", sorted(SCRIPTS.glob("*.py")), ids=lambda path: path.stem)
def test_scripts_are_commands(path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", [str(path), "--help"])
    runpy.run_path(str(path), run_name="__main__")
    assert "key=value ..." in capsys.readouterr().out


def test_a_wrong_verb_is_named(monkeypatch, capsys) -> None:
    with pytest.raises(SystemExit) as e:
        tdmpc2(monkeypatch, "acelerate", "task=a")
    assert e.value.code == 1
    assert capsys.readouterr().err == "error: 'acelerate' is not a verb; did you mean accelerate?\n"


def test_version(monkeypatch, capsys) -> None:
    tdmpc2(monkeypatch, "--version")
    assert capsys.readouterr().out == f"{__version__}\n"


def test_a_bare_path_is_shown_as_a_setting(monkeypatch, capsys, teacher: Path) -> None:
    with pytest.raises(SystemExit):
        tdmpc2(monkeypatch, "distill", teacher)
    assert f"e.g. checkpoint={teacher}," in capsys.readouterr().err


def test_evaluate_takes_a_bare_path(monkeypatch, capsys, teacher: Path) -> None:
    tdmpc2(monkeypatch, "evaluate", teacher, "episodes=1", "planner.compile=false")
    assert "mode: baseline" in capsys.readouterr().out


def test_info_says_what_a_checkpoint_is(monkeypatch, capsys, teacher: Path) -> None:
    tdmpc2(monkeypatch, "info", teacher)
    out = capsys.readouterr().out
    for word in ("Seen-v0", "16 samples, 1 iterations", "a new plan at every step", "0.95"):
        assert word in out
    elsewhere = teacher.rename(teacher.parent / "v=2, new")
    tdmpc2(monkeypatch, "info", elsewhere)
    assert "Seen-v0" in capsys.readouterr().out, "a path may have any characters"
    monkeypatch.chdir(teacher.parent)
    elsewhere.rename("teacher.new=2")
    tdmpc2(monkeypatch, "info", "teacher.new=2", "model.vmin=-10")
    assert "Seen-v0" in capsys.readouterr().out, "also one that looks like a setting of a part"
    with pytest.raises(SystemExit):
        tdmpc2(monkeypatch, "info", "model.vmim=-10", "agent=teacher.new=2")
    assert "did you mean model.vmin" in capsys.readouterr().err
    tdmpc2(monkeypatch, "info", TEACHER)  # an original file says less
    assert "512 samples" in capsys.readouterr().out


@pytest.mark.parametrize(
    "damage",
    [
        {"config.json": {"eval_return": "high"}},
        {"config.json": {"step": [1]}},
        {"config.json": {"provenance": "here"}},
        {"evaluation/summary.csv": "mode,return_mean,return_ratio,planner_calls\ntwo_tower_6,high,1,1\n"},
        {"evaluation/summary.csv": "\x00"},
        {"evaluation/chosen.json": "[]"},
    ],
)
def test_info_on_foreign_values(monkeypatch, capsys, teacher: Path, damage: dict) -> None:
    config = read_json(teacher / "config.json") | {"mode": "two_tower_6"}
    files = {
        "evaluation/summary.csv": "mode,return_mean,return_ratio,planner_calls\ntwo_tower_6,9,1,0.2\n",
        "evaluation/chosen.json": '{"why": "it is fast"}',
    }
    (teacher / "evaluation").mkdir()
    for name, text in files.items():
        (teacher / name).write_text(text)
    write_json(teacher / "config.json", config)
    tdmpc2(monkeypatch, "info", teacher)
    assert "20.0% planner calls" in capsys.readouterr().out
    for name, value in damage.items():
        if isinstance(value, dict):
            write_json(teacher / name, config | value)
        else:
            (teacher / name).write_text(value)
    with pytest.raises(SystemExit):
        tdmpc2(monkeypatch, "info", teacher)
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1


def test_info_without_a_return_ratio(monkeypatch, capsys, teacher: Path) -> None:
    write_json(teacher / "config.json", read_json(teacher / "config.json") | {"mode": "naive_3"})
    (teacher / "evaluation").mkdir()
    table = "mode,return_mean,return_ratio,planner_calls\nnaive_3,-12.34,,0.35\n"
    (teacher / "evaluation/summary.csv").write_text(table)
    write_json(teacher / "evaluation/chosen.json", {"why": "it is fast"})
    tdmpc2(monkeypatch, "info", teacher)
    assert "evaluated         return -12.3; 35.0% planner calls\n" in capsys.readouterr().out


def test_an_option_of_hydra_is_no_path(monkeypatch, capsys, teacher: Path) -> None:
    with pytest.raises(SystemExit):
        tdmpc2(monkeypatch, "info", "hydra.verbose=false", teacher)
    assert "is not key=value" in capsys.readouterr().err
    tdmpc2(monkeypatch, "info", "hydra.verbose=false", f"agent={teacher}")
    assert "Seen-v0" in capsys.readouterr().out


def test_tasks(monkeypatch, capsys) -> None:
    tdmpc2(monkeypatch, "tasks", "like=Walker-")
    assert capsys.readouterr().out.split() == [name for name in list_tasks() if "walker-" in name.lower()]
    with pytest.raises(SystemExit):
        tdmpc2(monkeypatch, "tasks", "like=qqq")


def test_evaluate_takes_the_task_from_the_checkpoint(monkeypatch, capsys, teacher: Path) -> None:
    tdmpc2(monkeypatch, "evaluate", f"checkpoint={teacher}", "episodes=2", "planner.compile=false")
    assert "6.0" in capsys.readouterr().out  # the return of six steps
    with pytest.raises(SystemExit):
        tdmpc2(monkeypatch, "evaluate", f"checkpoint={TEACHER}")
    assert "does not name its task" in capsys.readouterr().err


def test_play_draws_every_step(monkeypatch, tmp_path: Path, teacher: Path) -> None:
    out = tmp_path / "a.gif"
    tdmpc2(monkeypatch, "play", teacher, f"out={out}", "planner.compile=false", "baseline=true")
    with Image.open(out) as gif:
        assert gif.n_frames == STEPS // 2, "50 steps a second make 25 frames"
        seen = []
        for frame in range(gif.n_frames):
            gif.seek(frame)
            seen.append(np.asarray(gif.convert("L"))[150, [150, gif.width - 150]].tolist())
    assert all(left == right for left, right in seen), "both agents see the same"
    assert seen[0] < seen[1] < seen[2]


def test_play_writes_films(monkeypatch, capsys, tmp_path: Path, teacher: Path) -> None:
    out = tmp_path / "a.mp4"
    tdmpc2(monkeypatch, "play", teacher, f"out={out}", "planner.compile=false")
    film = imageio_ffmpeg.read_frames(str(out))
    assert next(film)["fps"] == 50
    assert len(list(film)) == STEPS
    monkeypatch.setattr(play, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        tdmpc2(monkeypatch, "play", teacher, f"out={out}")
    assert "pip install imageio-ffmpeg" in capsys.readouterr().err


@pytest.mark.parametrize("frame", [None, [1, 2], np.zeros((4, 4), np.uint8)])
def test_play_needs_pictures(monkeypatch, capsys, tmp_path: Path, teacher: Path, frame: object) -> None:
    monkeypatch.setattr(Seen, "render", lambda self: frame)
    monkeypatch.setattr(play.SpeculativeAgent, "act", lambda *_: pytest.fail("it compiled and acted first"))
    with pytest.raises(SystemExit):
        tdmpc2(monkeypatch, "play", teacher, f"out={tmp_path / 'a.gif'}", "planner.compile=false")
    assert "renders no pictures" in capsys.readouterr().err
    assert not (tmp_path / "a.gif").exists()


def test_play_looks_at_the_file_first(monkeypatch, capsys, tmp_path: Path, teacher: Path) -> None:
    monkeypatch.setattr(play, "open_teacher", lambda *_: pytest.fail("it began to play"))
    with pytest.raises(SystemExit):
        tdmpc2(monkeypatch, "play", teacher, f"out={tmp_path}/nowhere/a.gif")
    assert "nowhere/a.gif cannot be written" in capsys.readouterr().err


def test_play_needs_pygame_for_a_window(monkeypatch, capsys, teacher: Path) -> None:
    monkeypatch.setenv("DISPLAY", ":0")
    monkeypatch.setattr(play, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        tdmpc2(monkeypatch, "play", teacher)
    assert "pip install pygame" in capsys.readouterr().err


def test_play_needs_a_display_or_a_file(monkeypatch, capsys, teacher: Path) -> None:
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    with pytest.raises(SystemExit):
        tdmpc2(monkeypatch, "play", teacher)
    assert "give out=FILE.gif" in capsys.readouterr().err
