"""Input images of Qwen-Image's relatives inside the engine: the pipeline's start, condition latents, decoding."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from PIL import Image

from omni_rollout.models import family_module
from omni_rollout.models.base.images import made_image
from omni_rollout.models.base.qwen_processor import pil_processor
from omni_rollout.models.base.rollout import WARM_UP_WIDTH, to_uint8
from omni_rollout.models.qwen_image.rollout import QwenTransformer
from omni_rollout.types import Prompt, SamplingSpec

WARM_UP_PICTURE = 32  # pixels


class QwenPictures(QwenTransformer):
    """The first base, before `RolloutMixin`; uses parts of the stock pipeline, which is the last."""

    family: ClassVar[str]
    stock: ClassVar[type]
    vae: Any
    image_processor: Any
    _encode_vae_image: Any
    device: Any

    def __init__(self, *, od_config: Any, prefix: str = "") -> None:
        with pil_processor(sys.modules[self.stock.__module__]):
            super().__init__(od_config=od_config, prefix=prefix)  # type: ignore[call-arg]

    def warm_up(self, height: int, width: int) -> tuple[Prompt, SamplingSpec]:
        spec = family_module(self.family, "spec")
        images = (made_image(0, WARM_UP_PICTURE, WARM_UP_PICTURE),) * max(1, spec.RULES.images[0])
        size = {"height": height, "width": width, "true_cfg_scale": 1.0, "sde_type": "ode", "prompt_width": WARM_UP_WIDTH}
        return Prompt(text="dummy run", images=images), spec.resolve({**size, "extra": spec.WARM_UP_EXTRA}, images)

    def image_latents(self, images: Sequence[Image.Image], sizes: Sequence[Sequence[int]]) -> torch.Tensor:
        """[tokens, C] in the network's dtype: of all images, one after the other, each scaled to its (height, width)."""
        return torch.cat([self._encode_image(image, *size) for image, size in zip(images, sizes, strict=True)])

    def _encode_image(self, image: Image.Image, height: int, width: int) -> torch.Tensor:
        pixels = self.image_processor.preprocess(self.scaled(image, height, width), height, width).unsqueeze(2)
        # In the VAE's dtype; the stock pipelines take the text encoder's, and the engine may hold the two in different ones.
        latents = self._encode_vae_image(image=pixels.to(self.device, self.vae.dtype), generator=None)
        return packed(latents[0].transpose(0, 1)).to(self.dtype)

    def scaled(self, image: Image.Image, height: int, width: int) -> Image.Image:
        return self.image_processor.resize(image, height, width)

    def decoded(self, latents: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """[B, frames * S, C] fp32 -> uint8 [B, frames, height, width, channels]; each frame is an image of its own."""
        frames = unpacked(latents, height // 16, width // 16).to(self.vae.dtype)
        config = self.vae.config

        def per_channel(numbers: Sequence[float]) -> torch.Tensor:
            return torch.tensor(numbers).view(1, -1, 1, 1).to(frames.device, frames.dtype)

        # As the stock pipelines have it: divided by 1 / std, which rounds otherwise than multiplied by std.
        frames = frames / (1.0 / per_channel(config.latents_std)) + per_channel(config.latents_mean)
        pixels = self.vae.decode(frames[:, :, None], return_dict=False)[0][:, :, 0]
        return to_uint8(pixels).permute(0, 2, 3, 1).unflatten(0, (latents.shape[0], -1))


def packed(latents: torch.Tensor) -> torch.Tensor:
    """[frames, 16, h, w] -> [frames * h/2 * w/2, 64]: patches of 2x2, frame by frame."""
    frames, channels, height, width = latents.shape
    patches = latents.reshape(frames, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return patches.reshape(-1, channels * 4)


def unpacked(latents: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """The way back of `packed`."""
    patches = latents.reshape(-1, rows, columns, latents.shape[-1] // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return patches.reshape(-1, latents.shape[-1] // 4, 2 * rows, 2 * columns)
