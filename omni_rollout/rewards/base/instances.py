"""The objects in an image: each with its class, confidence, mask and box, by an instance segmentation model.

Mask2Former (arXiv 2112.01527), as `transformers` has it. A confidence is its class's probability times the mean probability
of its mask's pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from transformers import Mask2FormerForUniversalSegmentation
from transformers.models.mask2former.image_processing_pil_mask2former import Mask2FormerImageProcessorPil
from transformers.models.mask2former.modeling_mask2former import Mask2FormerForUniversalSegmentationOutput

from omni_rollout.diffusion.machine import compute_device
from omni_rollout.errors import UserError
from omni_rollout.rewards.base.pretrained import whole


@dataclass(frozen=True, kw_only=True)
class Instance:
    name: str  # of its class, as the model's config.json has it
    score: float  # 0 to 1
    mask: np.ndarray  # bool [H, W], of the image's size; not empty

    @property
    def box(self) -> tuple[int, int, int, int]:
        """Left, top, right, bottom in pixels; the last two are one beyond the mask's last."""
        columns, rows = (np.flatnonzero(self.mask.any(axis=axis)) for axis in (0, 1))
        return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


@cache  # a run makes its rewards twice: to check them before the engine starts, and to use them
def _loaded(model: str) -> tuple[Any, Mask2FormerImageProcessorPil]:
    network = whole(Mask2FormerForUniversalSegmentation, model).eval().to(compute_device())
    return network, Mask2FormerImageProcessorPil.from_pretrained(model)


class Detector:
    """Finds objects, one image at a time.

    Args:
        model: a folder, or a hub id, with weights and image processor.

    Raises:
        UserError: nothing of that kind can be loaded from there.
    """

    def __init__(self, name: str, model: str) -> None:
        try:
            self._model, self._processor = _loaded(model)
        except (OSError, ValueError) as error:
            raise UserError(
                f"reward {name}: no Mask2Former in {model} ({str(error).splitlines()[0]}); give reward.model.{name}=FOLDER"
            ) from error
        self.classes: list[str] = list(self._model.config.id2label.values())

    @torch.inference_mode()
    def __call__(self, image: np.ndarray, above: float) -> list[Instance]:
        """uint8 [H, W, 3] -> those whose confidence is more than `above`, the surest first."""
        pixels: Any = self._processor([image], return_tensors="pt", input_data_format="channels_last")
        out = self._model(pixel_values=pixels["pixel_values"].to(self._model.device))
        on_host = Mask2FormerForUniversalSegmentationOutput(
            class_queries_logits=out.class_queries_logits.cpu(), masks_queries_logits=out.masks_queries_logits.cpu()
        )
        # Without the image's size: the library would make masks of that size of all queries, also of those it then drops.
        found = self._processor.post_process_instance_segmentation(on_host, threshold=above, return_binary_maps=True)[0]
        instances = []
        for info, coarse in zip(found["segments_info"], found["segmentation"], strict=False):
            mask = torch.nn.functional.interpolate(coarse[None, None], size=image.shape[:2], mode="nearest")[0, 0] > 0
            if info["score"] > above and mask.any():
                name = self._model.config.id2label[info["label_id"]]
                instances.append(Instance(name=name, score=info["score"], mask=mask.numpy()))
        return sorted(instances, key=lambda instance: -instance.score)
