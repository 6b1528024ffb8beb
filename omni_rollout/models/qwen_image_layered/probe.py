"""What the parity probe must know of Qwen-Image-Layered beside what it knows of Qwen-Image."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from omni_rollout.models.base.images import made_image
from omni_rollout.models.qwen_image import probe as parent
from omni_rollout.types import InputImage


def __getattr__(name: str) -> Any:  # all else is Qwen-Image's
    return getattr(parent, name)


# First what the others hang on: a grid of another number of layers cuts the latents in other places.
MEANING = {
    "img_shapes": "the image grid differs: another number of layers, or other sizes",
    **parent.MEANING,
    "additional_t_cond": "one side is told of pictures with alpha, the other of pictures without",
}
SMALL: dict[str, Any] = {**parent.SMALL, "extra": {"layers": 2}}


def pictures(number: int) -> tuple[InputImage, ...]:
    return (made_image(number, 64, 64 + 16 * (number % 2)),)


def told(inputs: Mapping[str, Any]) -> dict[str, Any]:
    return parent.parted(inputs, targets=len(inputs["img_shapes"][0]) - 1)
