"""Qwen-Image-Edit inside vllm-omni's engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from PIL import Image
from vllm_omni.diffusion.models.qwen_image.pipeline_qwen_image_edit import QwenImageEditPipeline

from omni_rollout.models.base.rollout import RolloutMixin
from omni_rollout.models.qwen_image.pictures import QwenPictures
from omni_rollout.types import SamplingSpec


class EditPictures(QwenPictures):
    """What Qwen-Image-Edit and Edit-Plus have in common beyond other pipelines with input images."""

    prepare_latents: Any

    def vision_pictures(self, images: Sequence[Image.Image], spec: SamplingSpec) -> list[Image.Image]:
        return [self.scaled(image, *size) for image, size in zip(images, spec.extra["vision_sizes"], strict=True)]

    def conditions(self, images: Sequence[Image.Image], spec: SamplingSpec) -> dict[str, torch.Tensor]:
        return {"image_latents": self.image_latents(images, spec.extra["image_sizes"])}

    def noise(self, spec: SamplingSpec, generator: torch.Generator) -> torch.Tensor:
        channels, size = self.transformer.in_channels // 4, (spec.height, spec.width)
        latents, _ = self.prepare_latents(None, 1, channels, *size, torch.float32, self.device, generator)
        return latents

    def decode(self, latents: torch.Tensor, spec: SamplingSpec) -> torch.Tensor:
        return self.decoded(latents, spec.height, spec.width)[:, 0]


class QwenImageEditRolloutPipeline(EditPictures, RolloutMixin, QwenImageEditPipeline):
    family: ClassVar[str] = "qwen_image_edit"
    stock: ClassVar[type] = QwenImageEditPipeline

    def shown(self, images: Sequence[Image.Image], spec: SamplingSpec) -> dict[str, Any]:
        return {"image": self.vision_pictures(images, spec)[0]}
