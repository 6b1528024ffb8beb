"""How small an image gets as a JPEG: the reward to try a training loop on, since no model is needed and it rises at once.

Source: DDPO (arXiv 2305.13301), section 5.1.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from statistics import fmean

import numpy as np
from PIL import Image

from omni_rollout.rewards.base import Reward, score_each
from omni_rollout.types import Kind, Prompt

QUALITY = 95


class JPEGCompressibility:
    """Minus the size in kB (1000 bytes) at JPEG quality 95; never above 0. Of a video: the mean of its frames."""

    name = "jpeg_compressibility"
    kinds: frozenset[Kind] = frozenset({"image", "video"})

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Any prompt will do."""

    def __call__(self, images: Sequence[np.ndarray], prompts: Sequence[Prompt]) -> list[float]:
        return score_each(self.name, images, prompts, lambda media, _: -_mean_bytes(media) / 1000, self.kinds)

    def evaluate(self, images: Sequence[np.ndarray], prompts: Sequence[Prompt]) -> dict[str, float]:
        return {self.name: fmean(self(images, prompts))}


def _mean_bytes(media: np.ndarray) -> float:
    return float(jpeg_bytes(media)) if media.ndim == 3 else fmean(map(jpeg_bytes, media))


def jpeg_bytes(image: np.ndarray) -> int:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="JPEG", quality=QUALITY)
    return buffer.tell()


def make(threads: int) -> Reward:
    return JPEGCompressibility()
