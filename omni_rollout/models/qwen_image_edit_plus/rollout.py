"""Qwen-Image-Edit-Plus inside vllm-omni's engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from PIL import Image
from vllm_omni.diffusion.models.qwen_image.pipeline_qwen_image_edit_plus import QwenImageEditPlusPipeline

from omni_rollout.models.base.rollout import RolloutMixin
from omni_rollout.models.qwen_image_edit.rollout import EditPictures
from omni_rollout.types import SamplingSpec


class QwenImageEditPlusRolloutPipeline(EditPictures, RolloutMixin, QwenImageEditPlusPipeline):
    family: ClassVar[str] = "qwen_image_edit_plus"
    stock: ClassVar[type] = QwenImageEditPlusPipeline

    def shown(self, images: Sequence[Image.Image], spec: SamplingSpec) -> dict[str, Any]:
        return {"image": self.vision_pictures(images, spec)}  # the stock pipeline numbers them in this order
