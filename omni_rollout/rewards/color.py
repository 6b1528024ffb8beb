"""Whether what stands out in a picture has the colour its prompt asks for: no detector, so for plain grounds.

The share of the foreground's pixels that have the colour. Foreground is what is further from the median colour of the picture's
border than seven tenths of the largest distance. For one thing on a plain ground; elsewhere, ask a detector or `vlm_judge`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from omni_rollout.errors import UserError
from omni_rollout.rewards.base.contract import Columns, EachAlone, Reward
from omni_rollout.rewards.recolour import HUES, colors

BORDER = 3  # pixels at each edge of the top and the bottom
ABOVE = 0.7  # of the largest distance from the border's median
GREYS = {"black": (0, 85), "grey": (85, 170), "white": (170, 256)}  # brightness, mean of red, green and blue
NAMES = (*HUES, *GREYS)


class Color(EachAlone):
    def check(self, prompts: Sequence[str], metadata: Sequence[Columns]) -> None:
        for prompt, columns in zip(prompts, metadata, strict=True):
            wanted(prompt, columns)


def make(threads: int) -> Reward:
    return Color("color", "image", share)


def share(image: np.ndarray, prompt: str, columns: Columns) -> float:
    pixels = foreground(image)
    name = wanted(prompt, columns)
    hue = colors(pixels)
    if name in HUES:
        return float((hue == list(HUES).index(name)).mean())
    low, high = GREYS[name]
    brightness = pixels.mean(axis=1)
    return float(((hue == -1) & (brightness >= low) & (brightness < high)).mean())


def foreground(image: np.ndarray) -> np.ndarray:
    """uint8 [H, W, 3] -> [n, 3], its foreground's pixels; all of a picture of one colour."""
    pixels = image.astype(np.float64)
    border = np.concatenate([pixels[:BORDER].reshape(-1, 3), pixels[-BORDER:].reshape(-1, 3)])
    distance = np.linalg.norm(pixels - np.median(border, axis=0), axis=-1)
    return image[distance >= ABOVE * distance.max()]


def wanted(prompt: str, columns: Columns) -> str:
    """Metadata `color`, else the first colour that the prompt names.

    Raises:
        UserError: there is none, or one that is not known here.
    """
    given = columns.get("color") or next(iter(re.findall(rf"\b({'|'.join(NAMES)})\b", prompt.lower())), None)
    if given not in NAMES:
        raise UserError(
            f"color: prompt {prompt!r} asks for the colour {given!r}; expected metadata `color`, one of {', '.join(NAMES)}"
        )
    return given
