"""What the nano Qwen-Image-Edit learns: a picture of a number, a colour to give it, and the same picture in that colour."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from omni_rollout.nano import render

ASKED = tuple(color for color in render.COLORS if color != "black")
"""Colours that are asked for: those with a hue."""


@dataclass(frozen=True)
class Edit:
    """One picture and what to do with it."""

    source: render.Sign
    color: str
    """The colour asked for, another than the source's."""

    @property
    def prompt(self) -> str:
        return f"make it {self.color}"

    @property
    def target(self) -> render.Sign:
        return replace(self.source, color=self.color)


def other_colors(color: str) -> tuple[str, ...]:
    return tuple(asked for asked in ASKED if asked != color)


def sample_edit(rng: random.Random) -> Edit:
    """For training: of nine numbers, eight have two digits."""
    number = rng.choice(rng.choices((render.TRAIN_NUMBERS, render.DIGITS), weights=(8, 1))[0])
    source = render.sample_sign(rng, number, rng.choice(list(render.COLORS)))
    return Edit(source, rng.choice(other_colors(source.color)))


def sample_edits(count: int, seed: int) -> list[Edit]:
    rng = random.Random(f"edits {seed}")
    return [sample_edit(rng) for _ in range(count)]


def cases(texts: Sequence[str], count: int) -> list[Edit]:
    """`count` edits to measure by: all texts in turn, source and target colours moving on from round to round."""
    rng, colors = random.Random("cases of edits"), list(render.COLORS)
    edits = []
    for index in range(count):
        source = render.sample_sign(rng, texts[index % len(texts)], colors[(index + index // len(texts)) % len(colors)])
        others = other_colors(source.color)
        edits.append(Edit(source, others[(index // len(colors)) % len(others)]))
    return edits


def pictures(edits: Sequence[Edit]) -> list[np.ndarray]:
    return [render.draw(edit.source) for edit in edits]
