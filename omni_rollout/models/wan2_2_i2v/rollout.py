"""Wan2.2's image to video inside vllm-omni's engine: the condition, which is encoded once and recorded."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import numpy as np
import torch
from PIL import Image

from omni_rollout.models.base.images import made_image, open_image
from omni_rollout.models.base.rollout import RolloutMixin
from omni_rollout.models.base.velocity import Conditioning
from omni_rollout.models.wan2_2.rollout import WanTransformers
from omni_rollout.models.wan2_2.without_torchvision import without_torchvision
from omni_rollout.models.wan2_2_i2v.spec import resolve
from omni_rollout.types import InputImage, Prompt, SamplingSpec

with without_torchvision():
    from vllm_omni.diffusion.models.wan2_2 import Wan22I2VPipeline

WARM_UP_PICTURE = 32  # pixels


class WanI2VRolloutPipeline(WanTransformers, RolloutMixin, Wan22I2VPipeline):
    family: ClassVar[str] = "wan2_2_i2v"

    def warm_up(self, height: int, width: int) -> tuple[Prompt, SamplingSpec]:
        images = (made_image(0, WARM_UP_PICTURE, WARM_UP_PICTURE),)
        return Prompt(text="dummy run", images=images), resolve(self.warm_up_values(height, width), images)

    def encode(self, prompt: Prompt, spec: SamplingSpec) -> Conditioning:
        (image,) = prompt.images
        condition = self.encode_image(image, spec.height, spec.width, spec.extra["frames"])
        return replace(super().encode(prompt, spec), conditions={"condition": condition.to(self.dtype)})

    def encode_image(self, image: InputImage, height: int, width: int, frames: int) -> torch.Tensor:
        """[20, F', h, w] fp32: a mask of the given frame, and the latents of a video that is grey after it."""
        resized = open_image(image).resize((width, height), Image.Resampling.LANCZOS)
        pixels = torch.from_numpy(np.array(resized)).permute(2, 0, 1)[None].to(self.device).float() / 127.5 - 1
        unused = torch.empty(0)  # the noise is drawn elsewhere
        _, condition, _ = self.prepare_latents(
            pixels, 1, 0, height, width, frames, torch.float32, self.device, generator=None, latents=unused
        )
        return condition[0]
