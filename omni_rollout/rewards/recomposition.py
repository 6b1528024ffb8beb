"""How near layers come to the picture they were made from, when they are laid over each other again.

A single layer that holds the whole picture does as well as any: weigh it with a reward that wants them apart.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from omni_rollout.errors import UserError
from omni_rollout.models.base.images import open_image
from omni_rollout.rewards.base.contract import Columns, EachAlone, Reward, input_images


class Recomposition(EachAlone):
    """1 minus the mean absolute difference of the recomposed picture and the input image, as shares of full scale: 0 to 1."""

    def check(self, prompts: Sequence[str], metadata: Sequence[Columns]) -> None:
        for prompt, columns in zip(prompts, metadata, strict=True):
            if not input_images(columns):
                raise UserError(f"reward {self.name}: prompt {prompt!r} has no input image to compare with")


def score(layers: np.ndarray, prompt: str, columns: Columns) -> float:
    height, width = layers.shape[1:3]
    original = open_image(input_images(columns)[0], "RGBA").resize((width, height), Image.Resampling.LANCZOS)
    made, wanted = recomposed(layers), recomposed(np.asarray(original)[None])
    return 1 - float(np.abs(made - wanted).mean()) / 255


def recomposed(layers: np.ndarray) -> np.ndarray:
    """[L, H, W, 4] uint8 -> [H, W, 3] fp64: each laid over those before it, the first over white."""
    picture = np.full((*layers.shape[1:3], 3), 255.0)
    for layer in layers:
        alpha = layer[..., 3:] / 255
        picture = layer[..., :3] * alpha + picture * (1 - alpha)
    return picture


def make(threads: int) -> Reward:
    return Recomposition("recomposition", "layers", score)
