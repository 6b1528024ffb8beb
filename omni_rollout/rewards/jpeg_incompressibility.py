"""How large an image gets as a JPEG: `jpeg_compressibility` the other way round (DDPO, arXiv 2305.13301, section 5.1)."""

from __future__ import annotations

from omni_rollout.rewards.base.contract import EachAlone, Reward
from omni_rollout.rewards.jpeg_compressibility import jpeg_bytes


def make(threads: int) -> Reward:
    """The size in kB (1000 bytes) at JPEG quality 95; never below 0."""
    return EachAlone("jpeg_incompressibility", "image", lambda image, *_: jpeg_bytes(image) / 1000)
