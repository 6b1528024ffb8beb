"""The rules whose breaking costs Qwen-Image-Edit its equal bits: Qwen-Image's and those of its input images."""

from __future__ import annotations

from typing import Any

import torch

from omni_rollout.models.base.causes import Cause, changed_text
from omni_rollout.models.qwen_image import causes as parent
from omni_rollout.models.qwen_image import probe


def image_forgotten(inputs: dict[str, Any]) -> None:
    """The transformer is told that there is no input image: its latents are zeros."""
    parts = probe.told(inputs)
    inputs["hidden_states"] = torch.cat([parts["hidden_states"], torch.zeros_like(parts["image_latents"])], dim=1)


CAUSES: tuple[Cause | str, ...] = (
    *parent.CAUSES,
    Cause(
        name="image_latents",
        breaks="the latents of the input images are zeros",
        settled_by="omni_rollout/models/qwen_image/velocity.py, omni_rollout/models/qwen_image/pictures.py",
        broken=lambda setting: changed_text(setting, image_forgotten),
    ),
)
