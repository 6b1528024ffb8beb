"""Qwen-Image-Layered inside vllm-omni's engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from PIL import Image
from vllm_omni.diffusion.models.qwen_image.pipeline_qwen_image_layered import QwenImageLayeredPipeline

from omni_rollout.models.base.rollout import RolloutMixin
from omni_rollout.models.qwen_image.pictures import QwenPictures
from omni_rollout.types import SamplingSpec


class QwenImageLayeredRolloutPipeline(QwenPictures, RolloutMixin, QwenImageLayeredPipeline):
    family: ClassVar[str] = "qwen_image_layered"
    stock: ClassVar[type] = QwenImageLayeredPipeline
    mode: ClassVar[str] = "RGBA"

    def conditions(self, images: Sequence[Image.Image], spec: SamplingSpec) -> dict[str, torch.Tensor]:
        return {"image_latents": self.image_latents(images, [(spec.height, spec.width)])}

    def noise(self, spec: SamplingSpec, generator: torch.Generator) -> torch.Tensor:
        channels, layers = self.transformer.in_channels // 4, spec.extra["layers"]
        size = (spec.height, spec.width)
        latents, _ = self.prepare_latents(None, 1, channels, *size, layers, torch.float32, self.device, generator)
        return latents

    def decode(self, latents: torch.Tensor, spec: SamplingSpec) -> torch.Tensor:
        composite = latents.shape[1] // (spec.extra["layers"] + 1)  # tokens of frame 0
        return self.decoded(latents[:, composite:], spec.height, spec.width)
