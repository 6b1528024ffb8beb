"""What the parity probe must know of Wan2.2's image to video: its pictures; all else is that of text to video."""

from __future__ import annotations

from omni_rollout.models.base.images import made_image
from omni_rollout.models.wan2_2.probe import (
    MEANING,
    SMALL,
    TRUE_WIDTH,
    TRUE_WIDTH_STEPS,
    attention_name,
    rope_calls,
    rope_name,
    swapped_rope,
    told,
    trainer_outputs,
)
from omni_rollout.types import InputImage

__all__ = [
    "MEANING",
    "SMALL",
    "TRUE_WIDTH",
    "TRUE_WIDTH_STEPS",
    "attention_name",
    "rope_calls",
    "rope_name",
    "swapped_rope",
    "told",
    "trainer_outputs",
]


def pictures(number: int) -> tuple[InputImage, ...]:
    """Of the parity probe's prompt `number`."""
    return (made_image(number % 3, 48, 32 + 16 * (number % 3)),)
