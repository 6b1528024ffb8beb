"""How many parameters Qwen-Image-Edit has: as many as Qwen-Image, and the vision tower is used."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from omni_rollout.models.base.sizes import Sizes
from omni_rollout.models.qwen_image import sizes as parent

NAMES = ("Qwen/Qwen-Image-Edit", "Qwen/Qwen-Image-Edit-2509", "Qwen/Qwen-Image-Edit-2511")
PUBLISHED: dict[str, dict[str, Any]] = dict.fromkeys(NAMES, parent.PUBLISHED["Qwen/Qwen-Image"])


def read_sizes(path: str) -> Sizes:
    """See `qwen_image.sizes`."""
    return replace(parent.read_sizes(path, PUBLISHED), vision_kept=True)
