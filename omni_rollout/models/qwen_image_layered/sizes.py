"""How many parameters Qwen-Image-Layered has: Qwen-Image's formulas."""

from __future__ import annotations

from dataclasses import replace

from omni_rollout.models.base.sizes import Sizes
from omni_rollout.models.qwen_image import sizes as parent

_BASE = parent.PUBLISHED["Qwen/Qwen-Image"]
PUBLISHED = {
    "Qwen/Qwen-Image-Layered": {
        **_BASE,
        "transformer": {**_BASE["transformer"], "use_additional_t_cond": True},
        "vae": {**_BASE["vae"], "input_channels": 4},
    }
}


def read_sizes(path: str) -> Sizes:
    """See `qwen_image.sizes`; the engine's pipeline keeps the vision tower, though nothing is shown to it."""
    return replace(parent.read_sizes(path, PUBLISHED), vision_kept=True)
