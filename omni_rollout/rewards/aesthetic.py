"""How beautiful an image is, about 1 to 10: LAION's improved aesthetic predictor, a head on CLIP-L's image embedding.

The embedding has unit length. The head is linear layers without activations (768 to 1024, 128, 64, 16, 1; dropout between them
while it was trained). Its published file, `sac+logos+ava1-l14-linearMSE.pth`, goes into the folder of CLIP as `aesthetic.pth`;
it is read as tensors alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from omni_rollout.errors import UserError
from omni_rollout.rewards.base.contract import Columns, Reward, check_media
from omni_rollout.types import Kind

HEAD = "aesthetic.pth"


class Aesthetic:
    name = "aesthetic"
    kinds: frozenset[Kind] = frozenset({"image"})

    def __init__(self, model: str) -> None:
        from omni_rollout.rewards.base.clip import Clip

        try:
            saved = torch.load(Path(model) / HEAD, map_location="cpu", weights_only=True)
        except Exception as error:  # torch has many
            raise UserError(f"reward aesthetic: {Path(model) / HEAD} cannot be read ({str(error).splitlines()[0]})") from error
        self._clip = Clip(self.name, model)
        layers = sorted({int(name.split(".")[1]) for name in saved})  # layers.0.weight, layers.0.bias, layers.2.weight, ...
        device = self._clip.model.device
        self._layers = [[saved[f"layers.{layer}.{part}"].to(device).float() for part in ("weight", "bias")] for layer in layers]

    def __call__(self, images: Sequence[np.ndarray], prompts: Sequence[str], metadata: Sequence[Columns]) -> list[float]:
        from omni_rollout.rewards.base.clip import BATCH

        check_media(self.name, images, prompts)
        scores: list[float] = []
        for start in range(0, len(images), BATCH):
            values = self._clip.images(images[start : start + BATCH])
            for weight, bias in self._layers:
                values = torch.nn.functional.linear(values, weight, bias)
            scores += values[:, 0].tolist()
        return scores


def make(threads: int, model: str | None = None) -> Reward:
    if model is None:
        raise UserError(f"reward aesthetic: give reward.model.aesthetic=FOLDER, with CLIP-L and {HEAD}")
    return Aesthetic(model)
