"""What the parity probe must know of Qwen-Image-Edit: its sizes and pictures; all else is Qwen-Image's."""

from __future__ import annotations

from typing import Any

from omni_rollout.models.base.images import made_image
from omni_rollout.models.qwen_image import probe as parent
from omni_rollout.types import InputImage


def __getattr__(name: str) -> Any:  # all else is Qwen-Image's
    return getattr(parent, name)


SMALL: dict[str, Any] = {**parent.SMALL, "extra": {"vae_area": 64 * 64, "vision_area": 64 * 64}}


def pictures(number: int) -> tuple[InputImage, ...]:
    return (made_image(number, 64, 96 if number % 4 == 1 else 64),)
