"""The rules whose breaking costs Qwen-Image-Edit-Plus its equal bits: Qwen-Image-Edit's and its own."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from omni_rollout.models.base.causes import Cause, Setting, changed_text, swapped
from omni_rollout.models.qwen_image import probe
from omni_rollout.models.qwen_image_edit import causes as parent


def images_reversed(inputs: dict[str, Any]) -> None:
    parts, grid = probe.told(inputs), inputs["img_shapes"][0][1:]
    images = parts["image_latents"].split([math.prod(picture) for picture in grid], dim=1)
    inputs["hidden_states"] = torch.cat([parts["hidden_states"], *reversed(images)], dim=1)


@contextmanager
def images_at_the_targets_time(setting: Setting) -> Iterator[None]:
    """As checkpoints before 2511 have it; those change nothing."""
    with ExitStack() as stack:
        for layer in setting.policy.modules():
            if getattr(layer, "zero_cond_t", False):
                stack.enter_context(swapped(layer, "zero_cond_t", False))
        yield


CAUSES: tuple[Cause | str, ...] = (
    *parent.CAUSES,
    Cause(
        name="image_order",
        breaks="the latents of the input images come in reverse order",
        settled_by="omni_rollout/models/qwen_image/pictures.py",
        broken=lambda setting: changed_text(setting, images_reversed),
    ),
    Cause(
        name="zero_cond_t",
        breaks="input images are modulated by the target's time instead of 0",
        settled_by="the checkpoint's transformer/config.json",
        broken=images_at_the_targets_time,
    ),
)
