"""What the nano Wan2.2 learns to film: one digit in one colour that moves to the left or to the right."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from omni_rollout.nano import render

FRAMES, HEIGHT, WIDTH = 5, 48, 64
DIRECTIONS = {"left": -1, "right": 1}
COLORS = ("red", "green", "blue", "black")
Task = tuple[str, str, str]
"""Digit, colour, direction: what a prompt says."""
TASKS: tuple[Task, ...] = tuple(
    (digit, color, direction) for digit in render.DIGITS for color in COLORS for direction in DIRECTIONS
)


def _held_out(digit: str, color: str, direction: str) -> bool:
    return (int(digit) + COLORS.index(color) + 2 * (direction == "left")) % 4 == 0


HELD_OUT = tuple(task for task in TASKS if _held_out(*task))
"""A quarter, that no training video shows. Every digit is trained in other colours or directions, and so is all else."""
TRAIN = tuple(task for task in TASKS if not _held_out(*task))


def prompt_for(digit: str, color: str, direction: str) -> str:
    return f"the {color} digit {digit} moving {direction}"


@dataclass(frozen=True)
class Scene:
    """One video, fully described."""

    digit: str
    color: str
    direction: str
    background: tuple[int, int, int]
    font_size: int
    speed: int
    """Pixels a frame."""
    shift: tuple[int, int]
    """Offset of the digit's centre in the middle frame from the frame's centre, in pixels (right, down)."""

    @property
    def prompt(self) -> str:
        return prompt_for(self.digit, self.color, self.direction)


def sample_scene(rng: random.Random, task: Task) -> Scene:
    """Vary what a prompt leaves open: background, size, place, speed."""
    level = rng.randint(226, 250)
    background = (level + rng.randint(-5, 5), level + rng.randint(-5, 5), level + rng.randint(-5, 5))
    shift = (rng.randint(-4, 4), rng.randint(-2, 2))
    return Scene(*task, background, font_size=rng.randint(34, 38), speed=rng.randint(3, 5), shift=shift)


def sample_scenes(count: int, seed: int) -> list[Scene]:
    rng = random.Random(f"scenes {seed}")
    return [sample_scene(rng, rng.choice(TRAIN)) for _ in range(count)]


def cases(tasks: Sequence[Task], count: int) -> list[Scene]:
    """`count` scenes to measure by: all tasks in turn."""
    rng = random.Random("cases of scenes")
    return [sample_scene(rng, tasks[index % len(tasks)]) for index in range(count)]


def film(scene: Scene) -> np.ndarray:
    """uint8 RGB [FRAMES, HEIGHT, WIDTH, 3]."""
    return np.stack([_frame(scene, place) for place in range(FRAMES)])


def _frame(scene: Scene, place: int) -> np.ndarray:
    font = render.typeface(scene.font_size)
    left, top, right, bottom = font.getbbox(scene.digit, anchor="mm", stroke_width=render.STROKE_WIDTH)
    moved = DIRECTIONS[scene.direction] * scene.speed * (place - FRAMES // 2)
    corner = (
        WIDTH // 2 + scene.shift[0] + moved - round((left + right) / 2),
        HEIGHT // 2 + scene.shift[1] - round((top + bottom) / 2),
    )
    image = Image.new("RGB", (WIDTH, HEIGHT), scene.background)
    color = render.COLORS[scene.color]
    ImageDraw.Draw(image).text(corner, scene.digit, font=font, fill=color, anchor="mm", stroke_width=render.STROKE_WIDTH)
    return np.asarray(image)
