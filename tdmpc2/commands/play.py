"""Show an agent.

    tdmpc2 play pretrained/walker-walk                 a window, if there is a display
    tdmpc2 play pretrained/walker-walk out=walk.gif    a file, .gif or .mp4

Under the picture is a timeline of the episode, one column per step. Its colour shows the kind of step:
planned, corrected, fallback. The curves show mismatch and reward. `baseline=true` adds the same teacher with
the same seed; it replans at every step.
"""

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import gymnasium as gym
import numpy as np
from PIL import Image, ImageColor, ImageDraw
from rich.console import Console

from ..agent import Kind, SpeculativeAgent
from ..checked import Checked, at_least
from ..config import TEACHER, BudgetOverride, ModelOverride, SpeculationConfig
from ..corrector import BaseCorrector
from ..errors import ConfigError, TaskError
from ..files import atomic_write, check_writable
from ..loading import read_mode
from ..progress import Progress
from ..teacher import Teacher, open_teacher

COLOURS = {
    Kind.PLANNED: "#3b6fb6",
    Kind.CORRECTED: "#5aa469",
    Kind.OPEN_LOOP: "#9aa0a6",
    Kind.FALLBACK: "#d1495b",
    Kind.PRIOR: "#a97bc4",
}
SIZE = 288  # pixels, of the picture
MARGIN, LINE, BAND, CURVES = 8, 14, 12, 44  # pixels
INK, PAPER = "#202124", "#ffffff"
MISMATCH, REWARD = "#d1495b", "#e0a030"
GIF_COLOURS = 64
GIF_FPS = 25  # at most; browsers slow down faster GIFs


@dataclass(frozen=True, kw_only=True)
class Settings(Checked):
    """The agent to show, and for how long."""

    agent: str  # an accelerated agent or a teacher; `agent=` may be left out
    task: str | None = None  # None: the agent's own
    seed: int = 1000
    steps: int = 250  # at most
    baseline: bool = False  # also show the teacher that replans at every step
    out: str = ""  # a .gif or .mp4 file; "": a window
    planner: BudgetOverride = field(default_factory=BudgetOverride)
    model: ModelOverride = field(default_factory=ModelOverride)

    def check_ranges(self) -> None:
        at_least(1, self, "steps")
        at_least(0, self, "seed")
        if self.out and not self.out.endswith((".gif", ".mp4")):
            raise ConfigError(f"out={self.out}: must end with .gif or .mp4")


class Moment(NamedTuple):
    """One step of a shown episode."""

    picture: Image.Image
    kind: Kind
    mismatch: float  # NaN if a plan was due
    reward: float


class Show(NamedTuple):
    """A shown episode."""

    name: str
    fps: float  # of the task itself
    moments: list[Moment]


def main(settings: Settings) -> None:
    if settings.out:
        check_writable(settings.out)
        if settings.out.endswith(".mp4") and find_spec("imageio_ffmpeg") is None:
            raise ConfigError(".mp4 needs imageio-ffmpeg: `pip install imageio-ffmpeg`, or give out=FILE.gif")
    elif not _has_display():
        raise ConfigError("there is no display for a window: give out=FILE.gif")
    elif find_spec("pygame") is None:
        raise ConfigError("a window needs pygame: `pip install pygame`, or give out=FILE.gif")
    with Progress(Console()) as progress:
        teacher = open_teacher(settings.task, settings.agent, settings.planner, settings.model)
        shows = [_play(settings, teacher, *read_mode(settings.agent, teacher.model), progress)]
        if settings.baseline:
            shows.append(_play(settings, teacher, TEACHER, None, progress))
        if settings.out:
            write = _write_gif if settings.out.endswith(".gif") else _write_mp4
            write(shows, Path(settings.out))
            progress.print(f"{settings.out}: " + "; ".join(map(_summary, shows)))
    if not settings.out:
        _window(shows)


def _play(
    settings: Settings,
    teacher: Teacher,
    mode: SpeculationConfig,
    corrector: BaseCorrector | None,
    progress: Progress,
) -> Show:
    """Run an episode of the teacher in a mode."""
    agent = SpeculativeAgent(teacher.agent(1, settings.seed), mode, corrector)
    moments = []
    name = "replanning at every step" if mode == TEACHER else mode.in_words()
    with closing(teacher.env()) as env, progress.add(name, settings.steps, unit="steps") as stage:
        obs, _ = env.reset(seed=settings.seed)
        _picture(env)  # refuses an environment without pictures before the agent compiles
        agent.reset()
        for _ in range(settings.steps):
            obs, reward, terminated, truncated, _ = env.step(agent.act(obs))
            info = agent.info
            assert info is not None
            moments.append(Moment(_picture(env), info.kinds[0], info.mismatch.item(), float(reward)))
            stage.advance()
            if terminated or truncated:
                break
    return Show(name, env.metadata.get("render_fps", 50), moments)


def _picture(env: gym.Env) -> Image.Image:
    """The environment's picture; TaskError if it renders none."""
    pixels = env.render() if env.render_mode == "rgb_array" else None
    if not (isinstance(pixels, np.ndarray) and pixels.ndim == 3 and pixels.shape[2] == 3):
        raise TaskError(
            "the environment renders no pictures: register it with render_mode='rgb_array' "
            "(gymnasium.register(..., kwargs={'render_mode': 'rgb_array'}))"
        )
    return Image.fromarray(pixels.astype(np.uint8)).resize((SIZE, SIZE))


def _summary(show: Show) -> str:
    """The return and the number of plans so far."""
    planned = sum(m.kind in (Kind.PLANNED, Kind.FALLBACK) for m in show.moments)
    total = sum(m.reward for m in show.moments)
    return f"{show.name}: return {total:.0f} in {len(show.moments)} steps, {planned} plans"


def _frames(shows: Sequence[Show], every: int) -> Iterator[Image.Image]:
    """A picture of all shows, side by side, every `every` steps."""
    width = len(shows) * (SIZE + MARGIN) + MARGIN
    height = SIZE + 3 * LINE + BAND + CURVES + 3 * MARGIN
    for t in range(0, max(len(show.moments) for show in shows), every):
        image = Image.new("RGB", (width, height), PAPER)
        for i, show in enumerate(shows):
            _draw(image, show, min(t, len(show.moments) - 1), MARGIN + i * (SIZE + MARGIN))
        yield image


def _draw(image: Image.Image, show: Show, t: int, left: int) -> None:
    """Draw the picture of step `t`, and the timeline up to it."""
    past = show._replace(moments=show.moments[: t + 1])
    pen = ImageDraw.Draw(image)
    name, _, rest = _summary(past).partition(": ")
    pen.text((left, 2), name, INK)
    pen.text((left, 2 + LINE), rest, INK)
    image.paste(show.moments[t].picture, (left, 2 * LINE + MARGIN))
    top = SIZE + 2 * LINE + 2 * MARGIN
    step = SIZE / len(show.moments)
    for i, moment in enumerate(past.moments):
        pen.rectangle((left + i * step, top, left + (i + 1) * step, top + BAND), COLOURS[moment.kind])
    top += BAND + 2
    for colour, values in (
        (MISMATCH, [m.mismatch for m in show.moments]),
        (REWARD, [m.reward for m in show.moments]),
    ):
        scale = np.nanmax([*values, 1e-9])
        points = [
            (left + (i + 0.5) * step, top + CURVES * (1 - max(value, 0.0) / scale))
            for i, value in enumerate(values[: t + 1])
            if np.isfinite(value)
        ]
        if len(points) > 1:
            pen.line(points, colour)
    x = float(left)
    seen = {m.kind for m in show.moments}
    legend = [(k.name.lower().replace("_", " "), COLOURS[k]) for k in Kind if k in seen]
    for word, colour in [*legend, ("mismatch", MISMATCH), ("reward", REWARD)]:
        pen.text((x, top + CURVES), word, colour)
        x += pen.textlength(word) + MARGIN


def _write_gif(shows: Sequence[Show], path: Path) -> None:
    """Write all frames as a GIF that repeats."""
    every = max(1, round(shows[0].fps / GIF_FPS))
    pictures = list(_frames(shows, every))
    palette = _palette(pictures[len(pictures) // 2])
    frames = [picture.quantize(palette=palette, dither=Image.Dither.NONE) for picture in pictures]
    duration = round(1000 * every / shows[0].fps)
    with atomic_write(path) as tmp:
        frames[0].save(
            tmp, "GIF", save_all=True, append_images=frames[1:], duration=duration, loop=0, optimize=True
        )


def _palette(picture: Image.Image) -> Image.Image:
    """A palette of `GIF_COLOURS`, for all frames: those of the timeline, and the most frequent of a picture.

    With a palette of its own, a frame would lose the timeline's colours, which cover few pixels.
    """
    own = [ImageColor.getrgb(colour) for colour in (*COLOURS.values(), MISMATCH, REWARD, INK, PAPER)]
    frequent = GIF_COLOURS - len(own)
    colours = picture.quantize(frequent, dither=Image.Dither.NONE).getpalette() or []
    palette = Image.new("P", (1, 1))
    palette.putpalette([*colours[: 3 * frequent], *(x for colour in own for x in colour)])
    return palette


def _write_mp4(shows: Sequence[Show], path: Path) -> None:
    """Write all frames as a film at the task's speed."""
    import imageio_ffmpeg

    frames = list(_frames(shows, 1))
    with atomic_write(path) as tmp:
        film = imageio_ffmpeg.write_frames(
            str(tmp), frames[0].size, fps=shows[0].fps, macro_block_size=2, output_params=["-f", "mp4"]
        )
        film.send(None)
        for frame in frames:
            film.send(frame.tobytes())
        film.close()


def _window(shows: Sequence[Show]) -> None:
    """Show all frames at the task's speed, until the window is closed."""
    import pygame

    pygame.init()
    clock, frames = pygame.time.Clock(), list(_frames(shows, 1))
    screen = pygame.display.set_mode(frames[0].size)
    pygame.display.set_caption(shows[0].name)
    while True:
        for frame in frames:
            if any(event.type == pygame.QUIT for event in pygame.event.get()):
                pygame.quit()
                return
            screen.blit(pygame.image.frombytes(frame.tobytes(), frame.size, "RGB"), (0, 0))
            pygame.display.flip()
            clock.tick(shows[0].fps)


def _has_display() -> bool:
    return sys.platform != "linux" or any(map(os.environ.get, ("DISPLAY", "WAYLAND_DISPLAY")))
