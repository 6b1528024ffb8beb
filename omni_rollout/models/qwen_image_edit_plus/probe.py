"""What the parity probe must know of Qwen-Image-Edit-Plus: as Qwen-Image-Edit, with one to three pictures."""

from __future__ import annotations

from omni_rollout.models.base.images import made_image
from omni_rollout.models.qwen_image_edit.probe import (
    MEANING,
    OUTPUT_PROJECTIONS,
    SMALL,
    TRUE_WIDTH,
    TRUE_WIDTH_STEPS,
    attention_name,
    rope_calls,
    rope_name,
    stock_rope,
    swapped_rope,
    told,
    trainer_outputs,
)
from omni_rollout.types import InputImage

__all__ = [
    "MEANING",
    "OUTPUT_PROJECTIONS",
    "SMALL",
    "TRUE_WIDTH",
    "TRUE_WIDTH_STEPS",
    "attention_name",
    "rope_calls",
    "rope_name",
    "stock_rope",
    "swapped_rope",
    "told",
    "trainer_outputs",
]


def pictures(number: int) -> tuple[InputImage, ...]:
    """Two for most prompts, in another order for each; one and three for the others."""
    several = {1: 1, 3: 3}.get(number % 4, 2)
    return tuple(made_image(10 * number + place, 64, 64) for place in range(several))
