"""What the nano Qwen-Image-Layered learns: a picture of a number, and the background and the number it is made of."""

import random
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from omni_rollout.nano import render

LAYERS = 2
"""The background and, over it, the number."""
WHITE = (255, 255, 255)


def sample_sign(rng: random.Random, text: str, color: str) -> render.Sign:
    """As nano's, on a coloured ground: light enough for OCR to read every colour on it."""
    background = (rng.randint(190, 250), rng.randint(190, 250), rng.randint(190, 250))
    return replace(render.sample_sign(rng, text, color), background=background)


def sample_signs(count: int, seed: int) -> list[render.Sign]:
    """For training: of nine numbers, eight have two digits."""
    rng = random.Random(f"layered {seed}")
    return [sample_sign(rng, *_text_and_color(rng)) for _ in range(count)]


def _text_and_color(rng: random.Random) -> tuple[str, str]:
    number = rng.choice(rng.choices((render.TRAIN_NUMBERS, render.DIGITS), weights=(8, 1))[0])
    return number, rng.choice(list(render.COLORS))


def cases(texts: Sequence[str], count: int) -> list[render.Sign]:
    """`count` signs to measure by: all texts in turn, in a colour that moves on from round to round."""
    rng, colors = random.Random("cases of layers"), list(render.COLORS)
    return [
        sample_sign(rng, texts[index % len(texts)], colors[(index + index // len(texts)) % len(colors)])
        for index in range(count)
    ]


def matte(sign: render.Sign) -> np.ndarray:
    """uint8 [64, 64]: how much of each pixel the number covers."""
    black = render.COLORS["black"]
    drawn = render.draw(replace(sign, background=WHITE, color="black"))[..., 0].astype(float)
    return ((255 - drawn) * 255 / (255 - black[0])).round().astype(np.uint8)


def composite(sign: render.Sign) -> np.ndarray:
    """uint8 [64, 64, 4]: the whole picture, without a hole."""
    return opaque(render.draw(sign))


def layers(sign: render.Sign) -> list[np.ndarray]:
    """uint8 [64, 64, 4] each, the lowest first. Where the number's layer is empty, it is white."""
    alpha = matte(sign)
    color = np.where(alpha[..., None] > 0, render.COLORS[sign.color], WHITE).astype(np.uint8)
    return [opaque(np.full((*alpha.shape, 3), sign.background, np.uint8)), np.dstack([color, alpha])]


def opaque(rgb: np.ndarray) -> np.ndarray:
    return np.dstack([rgb, np.full(rgb.shape[:2], 255, np.uint8)])
