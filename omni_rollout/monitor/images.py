"""A step's images on one sheet, each with its caption."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from PIL import Image, ImageDraw, ImageFont

CaptionedImage: TypeAlias = tuple[str, np.ndarray]  # the array is [H, W, 3] uint8

_CELL = 160  # pixels: smaller images are enlarged to about this, so that captions can be read
_LINE = 14
_LINES = 3
_MARGIN = 4


def image_grid(images: Sequence[CaptionedImage]) -> Image.Image:
    """A nearly square sheet of the images, row by row, captions below them, cut after three lines.

    Pixels are repeated a whole number of times, never blended: what the sheet shows is what the model made.

    Raises:
        ValueError: no image, or one that is not [H, W, 3] uint8.
    """
    if not images:
        raise ValueError("no images: expected at least one")
    for caption, array in images:
        if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
            raise ValueError(f"image {caption!r} is {array.dtype} {list(array.shape)}: expected uint8 [H, W, 3]")
    scale = max(1, _CELL // max(array.shape[1] for _, array in images))
    width = max(array.shape[1] for _, array in images) * scale + 2 * _MARGIN
    height = max(array.shape[0] for _, array in images) * scale + 2 * _MARGIN + _LINES * _LINE
    columns = math.ceil(math.sqrt(len(images)))
    sheet = Image.new("RGB", (columns * width, math.ceil(len(images) / columns) * height), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=_LINE - 3)
    characters = max(1, int((width - 2 * _MARGIN) / font.getlength("x")))
    for index, (caption, array) in enumerate(images):
        left, top = index % columns * width + _MARGIN, index // columns * height + _MARGIN
        sheet.paste(Image.fromarray(array.repeat(scale, axis=0).repeat(scale, axis=1)), (left, top))
        for row, line in enumerate(textwrap.wrap(caption, characters)[:_LINES]):
            draw.text((left, top + array.shape[0] * scale + row * _LINE), line, fill="black", font=font)
    return sheet
