"""Images on one sheet, each with its caption."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from omni_rollout.types import KINDS, Kind

CaptionedImage: TypeAlias = tuple[str, np.ndarray]  # the array is media, see `Trajectory`

_CELL = 160  # pixels: smaller images are enlarged to about this, so that captions can be read
_LINE = 14
_LINES = 3
_MARGIN = 4
_SQUARE = 8  # pixels, of the chequerboard below transparent layers


def image_grid(images: Sequence[CaptionedImage], columns: int | None = None) -> Image.Image:
    """A sheet of the images, row by row, captions below them, cut after three lines.

    Of a video: its first, middle and last frame side by side; of layers: all, over a chequerboard.

    Pixels are repeated a whole number of times, never blended: what the sheet shows is what the model made.

    Args:
        columns: images a row, such as those of a group; None: as many as make it nearly square.

    Raises:
        ValueError: no image, or what is no media.
    """
    if not images:
        raise ValueError("no images: expected at least one")
    images = [(caption, flat(caption, media)) for caption, media in images]
    scale = max(1, _CELL // max(array.shape[1] for _, array in images))
    width = max(array.shape[1] for _, array in images) * scale + 2 * _MARGIN
    height = max(array.shape[0] for _, array in images) * scale + 2 * _MARGIN + _LINES * _LINE
    columns = columns or math.ceil(math.sqrt(len(images)))
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


def cut(sheet: Image.Image, count: int) -> list[Image.Image]:
    """The images of a sheet that `image_grid` has made of `count` without `columns`, enlarged as they are there.

    Raises:
        ValueError: it is no such sheet.
    """
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns) if count else 0
    if not rows or sheet.width % columns or sheet.height % rows:
        raise ValueError(f"a sheet of {sheet.width}x{sheet.height} pixels: expected one of {count} images")
    width, height = sheet.width // columns, sheet.height // rows
    right, bottom = width - _MARGIN, height - _MARGIN - _LINES * _LINE
    if right <= _MARGIN or bottom <= _MARGIN:
        raise ValueError(f"a sheet of {sheet.width}x{sheet.height} pixels: too small for {count} images")
    places = [(index % columns * width, index // columns * height) for index in range(count)]
    return [sheet.crop((left + _MARGIN, top + _MARGIN, left + right, top + bottom)) for left, top in places]


def kind_of(caption: str, media: np.ndarray) -> Kind:
    """Raises ValueError: what is no media."""
    kind = KINDS.get((media.ndim, media.shape[-1])) if media.dtype == np.uint8 else None
    if kind is None:
        raise ValueError(f"image {caption!r} is {media.dtype} {list(media.shape)}: expected uint8 [H, W, 3] or other media")
    return kind


def flat(caption: str, media: np.ndarray) -> np.ndarray:
    """[H, W', 3] uint8 of media of any kind."""
    kind = kind_of(caption, media)
    if kind == "image":
        return media
    if kind == "video":
        return np.concatenate([media[place] for place in sorted({0, len(media) // 2, len(media) - 1})], axis=1)
    rows, columns = np.indices(media.shape[1:3]) // _SQUARE
    board = np.where((rows + columns) % 2, 160, 220)[None, :, :, None]
    alpha = media[..., 3:] / 255
    return np.concatenate(list((media[..., :3] * alpha + board * (1 - alpha)).round().astype(np.uint8)), axis=1)
