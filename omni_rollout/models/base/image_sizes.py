"""Sizes that follow from the sizes of input images: arithmetic alone, no pixels and no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from omni_rollout.types import InputImage, RequestError

ALIGNMENT = 32  # pixels; Qwen-Image's published pipelines round both sides to it


def size_of_area(area: int, image: InputImage) -> tuple[int, int]:
    """(height, width) of about `area` pixels and the image's aspect ratio, multiples of `ALIGNMENT`.

    Raises:
        RequestError: an image so narrow that a side would be 0.
    """
    ratio = image.width / image.height
    width = math.sqrt(area * ratio)
    height = width / ratio
    rounded = round(height / ALIGNMENT) * ALIGNMENT, round(width / ALIGNMENT) * ALIGNMENT
    if not min(rounded):
        raise RequestError(
            f"image {image.path}: {image.width}x{image.height} pixels, scaled to an area of {area}, is narrower than "
            f"{ALIGNMENT // 2}; crop it, or give a larger area"
        )
    return rounded


def target_size(parameters: Mapping[str, Any], default: tuple[int, int]) -> dict[str, Any]:
    """`parameters` with `height` and `width`: both as given, or both as `default`.

    Raises:
        RequestError: one of the two alone.
    """
    given = {side: parameters.get(side) for side in ("height", "width")}
    if None not in given.values():
        return dict(parameters)
    if any(size is not None for size in given.values()):
        raise RequestError(
            f"height={given['height']}, width={given['width']}: give both, or neither: then they follow from the input image"
        )
    return {**parameters, "height": default[0], "width": default[1]}


def is_sizes(value: Any, multiple: int = 1) -> bool:
    """Whether `value` is a list of [height, width], each a positive multiple."""
    return all(
        isinstance(size, list)
        and len(size) == 2
        and all(isinstance(side, int) and side > 0 and side % multiple == 0 for side in size)
        for size in value
    )


def sizes_of(images: Sequence[InputImage], given: Any, area: int, name: str) -> list[list[int]]:
    """[height, width] of every image: as `given`, or as its own aspect ratio has it.

    Raises:
        RequestError: as many sizes as images are expected.
    """
    if given is None:
        return [list(size_of_area(area, image)) for image in images]
    if len(given) != len(images):
        raise RequestError(f"sampling.extra.{name} has {len(given)} sizes, the prompt has {len(images)} images: one for each")
    return given
