"""What the parity probe must know of Wan2.2's image to video: its pictures; all else is that of text to video."""

from __future__ import annotations

from typing import Any

from omni_rollout.models.base.images import made_image
from omni_rollout.models.wan2_2 import probe as parent
from omni_rollout.types import InputImage


def __getattr__(name: str) -> Any:  # all else is that of text to video
    return getattr(parent, name)


def pictures(number: int) -> tuple[InputImage, ...]:
    """Of the parity probe's prompt `number`."""
    return (made_image(number % 3, 48, 32 + 16 * (number % 3)),)
