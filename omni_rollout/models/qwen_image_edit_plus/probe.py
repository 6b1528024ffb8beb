"""What the parity probe must know of Qwen-Image-Edit-Plus: as Qwen-Image-Edit, with one to three pictures."""

from __future__ import annotations

from typing import Any

from omni_rollout.models.base.images import made_image
from omni_rollout.models.qwen_image_edit import probe as parent
from omni_rollout.types import InputImage


def __getattr__(name: str) -> Any:  # all else is Qwen-Image-Edit's
    return getattr(parent, name)


def pictures(number: int) -> tuple[InputImage, ...]:
    """Two for most prompts, in another order for each; one and three for the others."""
    several = {1: 1, 3: 3}.get(number % 4, 2)
    return tuple(made_image(10 * number + place, 64, 64) for place in range(several))
