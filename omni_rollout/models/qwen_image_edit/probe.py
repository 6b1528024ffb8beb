"""What the parity probe must know of Qwen-Image-Edit: its sizes and pictures; all else is Qwen-Image's."""

from __future__ import annotations

from typing import Any

from omni_rollout.models.base.images import made_image
from omni_rollout.models.qwen_image import probe as parent
from omni_rollout.models.qwen_image.probe import (
    MEANING,
    OUTPUT_PROJECTIONS,
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

SMALL: dict[str, Any] = {**parent.SMALL, "extra": {"vae_area": 64 * 64, "vision_area": 64 * 64}}


def pictures(number: int) -> tuple[InputImage, ...]:
    return (made_image(number, 64, 96 if number % 4 == 1 else 64),)
