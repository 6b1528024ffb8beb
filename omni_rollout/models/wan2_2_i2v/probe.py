"""What the parity probe must know beside Wan2.2's text to video: pictures, made by us."""

from __future__ import annotations

from omni_rollout.models.base.images import made_image
from omni_rollout.models.wan2_2 import probe as parent
from omni_rollout.models.wan2_2.probe import (
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

MEANING = {
    **parent.MEANING,
    "hidden_states": "the latents that the transformer saw, or the condition beside them, are not those of the record",
}
PICTURES = 3
SIDE = 48  # pixels; the width of a picture


def pictures(number: int) -> tuple[InputImage, ...]:
    """Of the parity probe's prompt `number`: of three shapes."""
    number %= PICTURES
    return (made_image(number, SIDE * (number + 2) // 3, SIDE),)
