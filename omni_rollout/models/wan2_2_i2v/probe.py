"""What the parity probe must know beside Wan2.2's text to video: pictures, made by us."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from PIL import Image

from omni_rollout.models.base.images import describe
from omni_rollout.models.wan2_2 import probe as parent
from omni_rollout.models.wan2_2.probe import (
    SMALL,
    TRUE_WIDTH,
    TRUE_WIDTH_STEPS,
    attention_name,
    rope_calls,
    rope_name,
    swapped_rope,
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
    "trainer_outputs",
]

MEANING = {
    **parent.MEANING,
    "hidden_states": "the latents that the transformer saw, or the condition beside them, are not those of the record",
}
PICTURES = 3
SIDE = 48  # pixels; the width of a picture


def pictures(number: int) -> tuple[InputImage, ...]:
    """Of the parity probe's prompt `number`."""
    return (_picture(number % PICTURES),)


@cache
def _picture(number: int) -> InputImage:
    """Colours that differ at every corner, so that no turn or swap of channels leaves it as it is."""
    height = SIDE * (number + 2) // 3
    rows, columns = np.mgrid[:height, :SIDE] * 5
    pixels = np.stack([rows + 40 * number, columns, rows + 2 * columns + 90], axis=-1) % 256
    path = Path(_folder().name) / f"{number}.png"
    Image.fromarray(pixels.astype(np.uint8)).save(path)
    return describe(path)


@cache
def _folder() -> TemporaryDirectory[str]:
    return TemporaryDirectory(prefix="omni_rollout-")
