"""Whether a text moves where it was asked to, and stays the same text: for models that make videos.

The reward is how far the centre of what stands out from the background moves between the first frame and the last, in the
direction asked for, as a share of `FULL` and at most 1; times how well the text is read, in the frame of the two where it is
read worse. A still, a motion the other way and a text that dissolves get 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

import numpy as np

from omni_rollout.errors import UserError
from omni_rollout.rewards import ocr
from omni_rollout.rewards.base.contract import Columns, Reward, score_each
from omni_rollout.rewards.recolour import ink
from omni_rollout.types import Kind

DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
"""Columns, rows: a row further down has a larger number."""
FULL = 0.125
"""Of the frame's width, or of its height for up and down: a move that is worth all."""


class Displacement:
    """Needs of every prompt the metadata `direction`, and the wanted text as `ocr` does."""

    name = "displacement"
    kinds: frozenset[Kind] = frozenset({"video"})

    def __init__(self, reader: ocr.OCRReward) -> None:
        self.reader = reader

    def check(self, prompts: Sequence[str], metadata: Sequence[Columns]) -> None:
        self.reader.check(prompts, metadata)
        for prompt, columns in zip(prompts, metadata, strict=True):
            found = columns.get("direction")
            if found not in tuple(DIRECTIONS):  # which may be anything, also what cannot be hashed
                where = f"reward {self.name}: prompt {prompt!r}: metadata `direction` is {found!r}"
                raise UserError(f"{where}; expected one of {', '.join(DIRECTIONS)}")

    def __call__(self, images: Sequence[np.ndarray], prompts: Sequence[str], metadata: Sequence[Columns]) -> list[float]:
        self.check(prompts, metadata)
        moved = score_each(self.name, images, prompts, metadata, moved_share, "video")
        read = [self.reader([video[end] for video in images], prompts, metadata) for end in (0, -1)]
        return [share * min(ends) for share, *ends in zip(moved, *read, strict=True)]

    def evaluate(self, images: Sequence[np.ndarray], prompts: Sequence[str], metadata: Sequence[Columns]) -> dict[str, float]:
        """The mean reward, how far texts move, and how many are read exactly at the end, by RapidOCR's own settings."""
        moved = score_each(self.name, images, prompts, metadata, moved_share, "video")
        read = self.reader.evaluate([video[-1] for video in images], prompts, metadata)
        scores = self(images, prompts, metadata)
        return {self.name: fmean(scores), "moved": fmean(moved), "exact_match": read["exact_match"]}


def moved_share(video: np.ndarray, prompt: str, columns: Columns) -> float:
    """uint8 [F, H, W, 3] -> 0 to 1; 0 where nothing stands out in the first frame or in the last."""
    shown = [ink(video[0]), ink(video[-1])]
    if not all(pixels.any() for pixels in shown):
        return 0.0
    first, last = (np.argwhere(pixels).mean(axis=0) for pixels in shown)
    height, width = video.shape[1:3]
    columns_moved, rows_moved = DIRECTIONS[columns["direction"]]
    way = columns_moved * (last[1] - first[1]) / width + rows_moved * (last[0] - first[0]) / height
    return float(np.clip(way / FULL, 0, 1))


def make(threads: int) -> Reward:
    return Displacement(ocr.make(threads))
