"""Whether the text in a picture got the colour asked for and is still the same text: for models that edit pictures.

The reward is the share of the text's pixels that have the colour, if the text is read exactly, else 0. Which pixels these are
is known from the input image: those that differ from its background. What the rest of the picture looks like counts only in
so far as the text must be legible: weigh it with another reward where the background matters.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from statistics import fmean

import numpy as np
from PIL import Image

from omni_rollout.errors import UserError
from omni_rollout.models.base.images import open_image
from omni_rollout.rewards import ocr
from omni_rollout.rewards.base.contract import Columns, Reward, input_images, score_each
from omni_rollout.types import InputImage, Kind, RequestError

HUES = {"red": 0, "orange": 30, "yellow": 60, "green": 120, "cyan": 180, "blue": 240, "purple": 285, "pink": 330}
"""Degrees. A pixel has the colour of the nearest of them."""

LEAST_CHROMA = 40
"""Of 255: the largest minus the smallest of red, green and blue, below which a pixel is grey and has no colour."""

TEXT_ABOVE = 0.5
"""Of the largest distance from the background in the input image: pixels further away are the text's."""

LEAST_CONTRAST = 48.0
"""Of the largest distance from the background, below which an input image shows no text."""

BORDER = 2
"""Rows at the top and at the bottom whose median is the background."""


class Recolour:
    """Needs an input image with text on a plain background, and of every prompt the metadata `text` and `color`."""

    name = "recolour"
    kinds: frozenset[Kind] = frozenset({"image"})

    def __init__(self, reader: ocr.OCRReward) -> None:
        self.reader = reader

    def check(self, prompts: Sequence[str], metadata: Sequence[Columns]) -> None:
        for prompt, columns in zip(prompts, metadata, strict=True):
            _check(prompt, columns)

    def __call__(self, images: Sequence[np.ndarray], prompts: Sequence[str], metadata: Sequence[Columns]) -> list[float]:
        self.check(prompts, metadata)
        shares = score_each(self.name, images, prompts, metadata, color_share)
        read = [similarity == 1 for similarity in self.reader(images, prompts, metadata)]
        return [share * same for share, same in zip(shares, read, strict=True)]

    def evaluate(self, images: Sequence[np.ndarray], prompts: Sequence[str], metadata: Sequence[Columns]) -> dict[str, float]:
        """The mean reward and its two factors, read with RapidOCR's own settings."""
        shares = score_each(self.name, images, prompts, metadata, color_share)
        read = self.reader.exact_match(images, prompts, metadata)
        return {
            self.name: fmean(share * same for share, same in zip(shares, read, strict=True)),
            "color_share": fmean(shares),
            "exact_match": fmean(read),
        }


def make(threads: int) -> Reward:
    return Recolour(ocr.make(threads))


def _check(prompt: str, columns: Columns) -> None:
    where = f"reward {Recolour.name}: prompt {prompt!r}"
    images = input_images(columns)
    if not images:
        raise UserError(f"{where} has no input image, so nobody knows where the text stands; give it `images`")
    for name in ("text", "color"):
        if name not in columns:
            raise UserError(
                f"{where} has no metadata `{name}`; give the text of the picture as `text`, its new colour as `color`"
            )
    ocr.target_text(prompt, columns)
    if columns["color"] not in tuple(HUES):  # which may be anything, also what cannot be hashed
        raise UserError(f"{where}: metadata `color` is {columns['color']!r}; expected one of {', '.join(HUES)}")
    image = images[0]
    try:
        text_pixels(image, image.height, image.width)
    except RequestError as error:
        raise UserError(f"{where}: {error}") from error


def color_share(made: np.ndarray, prompt: str, columns: Columns) -> float:
    """Of the text's pixels in the input image, the share that have the colour asked for in `made`, uint8 [H, W, 3]."""
    text = text_pixels(input_images(columns)[0], *made.shape[:2])
    return float((colors(made[text]) == list(HUES).index(columns["color"])).mean())


def colors(pixels: np.ndarray) -> np.ndarray:
    """uint8 [n, 3] -> [n], the place in `HUES` of each pixel's colour; -1: it is grey."""
    rgb = pixels.astype(np.float64)
    chroma = rgb.max(axis=1) - rgb.min(axis=1)
    red, green, blue = rgb.T
    # The angle of the three axes' projection on the plane of equal brightness, six pieces of 60 degrees.
    safe = np.maximum(chroma, 1)
    pieces = [((green - blue) / safe) % 6, (blue - red) / safe + 2, (red - green) / safe + 4]
    hue = 60 * np.choose(rgb.argmax(axis=1), pieces)
    away = np.abs(hue[:, None] - np.array(list(HUES.values())))
    nearest = np.minimum(away, 360 - away).argmin(axis=1)
    return np.where(chroma < LEAST_CHROMA, -1, nearest)


@lru_cache(maxsize=4096)
def text_pixels(image: InputImage, height: int, width: int) -> np.ndarray:
    """bool [height, width], where the text stands in the input image scaled to this size.

    Raises:
        RequestError: the file cannot be read, is another one, or shows no text.
    """
    scaled = open_image(image).resize((width, height), Image.Resampling.LANCZOS)
    text = ink(np.asarray(scaled))
    if not text.any():
        raise RequestError(f"image {image.path} shows no text on a plain background: no pixel stands out from its border")
    return text


def ink(pixels: np.ndarray) -> np.ndarray:
    """bool [H, W] of a picture uint8 [H, W, 3]: what stands out from the border's colour; nothing, where little does."""
    pixels = pixels.astype(np.float64)
    border = np.concatenate([pixels[:BORDER], pixels[-BORDER:]]).reshape(-1, 3)
    distance = np.linalg.norm(pixels - np.median(border, axis=0), axis=-1)
    return (distance > TEXT_ABOVE * distance.max()) & (distance.max() >= LEAST_CONTRAST)
