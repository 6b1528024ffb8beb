"""Whether the top layer holds the text of a picture and nothing else: for models that take pictures apart.

The reward is how far the layer's alpha, the matte, agrees with the text's pixels (intersection over union), times how well the
text is read in the matte alone, drawn black on white. Which pixels are the text's is known from the input image: those that
differ from its background. An empty layer and one without a hole show no text, so they get 0, whatever their colours are.
Colours do not count: weigh it with `recomposition` where they matter.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

import numpy as np

from omni_rollout.errors import UserError
from omni_rollout.rewards import ocr
from omni_rollout.rewards.base.contract import Columns, Reward, input_images, score_each
from omni_rollout.rewards.recolour import text_pixels
from omni_rollout.types import Kind, RequestError

COVERED = 127
"""A layer covers the pixels whose alpha is above this, of 255."""


class Matte:
    """Needs an input image with text on a plain background, and the wanted text as `ocr` does."""

    name = "matte"
    kinds: frozenset[Kind] = frozenset({"layers"})

    def __init__(self, reader: ocr.OCRReward) -> None:
        self.reader = reader

    def check(self, prompts: Sequence[str], metadata: Sequence[Columns]) -> None:
        for prompt, columns in zip(prompts, metadata, strict=True):
            where = f"reward {self.name}: prompt {prompt!r}"
            images = input_images(columns)
            if not images:
                raise UserError(f"{where} has no input image, so nobody knows where the text stands; give it `images`")
            try:
                text_pixels(images[0], images[0].height, images[0].width)
            except RequestError as error:
                raise UserError(f"{where}: {error}") from error
        self.reader.check(prompts, metadata)

    def __call__(self, images: Sequence[np.ndarray], prompts: Sequence[str], metadata: Sequence[Columns]) -> list[float]:
        self.check(prompts, metadata)
        agreed = score_each(self.name, images, prompts, metadata, agreement, "layers")
        read = self.reader(drawn(images), prompts, metadata)
        return [share * similarity for share, similarity in zip(agreed, read, strict=True)]

    def evaluate(self, images: Sequence[np.ndarray], prompts: Sequence[str], metadata: Sequence[Columns]) -> dict[str, float]:
        """The mean reward and its two factors, with how many texts are read exactly, by RapidOCR's own settings."""
        agreed = score_each(self.name, images, prompts, metadata, agreement, "layers")
        read = self.reader.evaluate(drawn(images), prompts, metadata)
        scores = self(images, prompts, metadata)
        return {self.name: fmean(scores), "iou": fmean(agreed), "exact_match": read["exact_match"]}


def agreement(layers: np.ndarray, prompt: str, columns: Columns) -> float:
    """Of the pixels that the top layer of uint8 [L, H, W, 4] covers and the text's: those in both, over those in either."""
    covered = layers[-1, ..., 3] > COVERED
    text = text_pixels(input_images(columns)[0], *covered.shape)
    return float((covered & text).sum() / (covered | text).sum())


def drawn(images: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The top layers' mattes as pictures, uint8 [H, W, 3]: black on white."""
    return [np.repeat(255 - layers[-1, ..., 3:], 3, axis=-1) for layers in images]


def make(threads: int) -> Reward:
    return Matte(ocr.make(threads))
