"""How small an image gets as a JPEG: the reward to try a training loop on, since no model is needed and it rises at once.

Source: DDPO (arXiv 2305.13301), section 5.1.
"""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from omni_rollout.rewards.base.contract import EachAlone, Reward

QUALITY = 95


def jpeg_bytes(image: np.ndarray) -> int:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="JPEG", quality=QUALITY)
    return buffer.tell()


def make(threads: int) -> Reward:
    """Minus the size in kB (1000 bytes) at JPEG quality 95; never above 0."""
    return EachAlone("jpeg_compressibility", "image", lambda image, *_: -jpeg_bytes(image) / 1000)
