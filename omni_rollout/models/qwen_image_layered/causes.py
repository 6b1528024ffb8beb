"""The rules whose breaking costs Qwen-Image-Layered its equal bits: Qwen-Image's and its own."""

from __future__ import annotations

from typing import Any

import torch

from omni_rollout.models.base.causes import Cause, changed_text
from omni_rollout.models.qwen_image import causes as parent


def told_without_alpha(inputs: dict[str, Any]) -> None:
    inputs["additional_t_cond"] = torch.ones_like(inputs["additional_t_cond"])


def composite_last(inputs: dict[str, Any]) -> None:
    """Frame 0, the picture that the layers make together, in the place of the last layer."""
    grid, whole = inputs["img_shapes"][0], inputs["hidden_states"]
    frames = whole.unflatten(1, (len(grid), -1))
    inputs["hidden_states"] = torch.cat([frames[:, 1:-1], frames[:, :1], frames[:, -1:]], dim=1).flatten(1, 2)


CAUSES: tuple[Cause | str, ...] = (
    *parent.CAUSES,
    Cause(
        name="additional_t_cond",
        breaks="the transformer is told of pictures without alpha",
        settled_by="omni_rollout/models/qwen_image_layered/velocity.py",
        broken=lambda setting: changed_text(setting, told_without_alpha),
    ),
    Cause(
        name="layer_order",
        breaks="the composite is packed after the layers instead of before them",
        settled_by="omni_rollout/models/qwen_image_layered/spec.py",
        broken=lambda setting: changed_text(setting, composite_last),
    ),
)
