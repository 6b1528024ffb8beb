"""What differs from Wan2.2's text to video: the size follows the input image, and a condition stands beside the latents."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from omni_rollout.models.base import sampling
from omni_rollout.models.base.image_sizes import target_size
from omni_rollout.models.base.sampling import Rules
from omni_rollout.models.wan2_2 import spec as parent
from omni_rollout.models.wan2_2.checkpoint import misfits
from omni_rollout.models.wan2_2.spec import COMPONENTS, EXPERTS, KIND, TRANSFORMER, expert, schedule, text_tokens
from omni_rollout.types import InputImage, Layout, SamplingSpec

__all__ = ["COMPONENTS", "EXPERTS", "KIND", "TRANSFORMER", "expert", "schedule", "text_tokens"]

PARENT: str | None = "wan2_2"
ROLLOUT_PIPELINE = "omni_rollout.models.wan2_2_i2v.rollout.WanI2VRolloutPipeline"
PIPELINE = "WanImageToVideoPipeline"  # what model_index.json calls it

# None: they follow from the input image.
DEFAULTS: dict[str, Any] = {**parent.DEFAULTS, "height": None, "width": None, "true_cfg_scale": 5.0}
AREA = parent.DEFAULTS["height"] * parent.DEFAULTS["width"]  # pixels of a frame, where its size is left to the image
MASK_CHANNELS = 4  # that say which frames are given
CONDITION_CHANNELS = MASK_CHANNELS + parent.LATENT_CHANNELS
IN_CHANNELS = parent.IN_CHANNELS + CONDITION_CHANNELS

RULES = Rules(
    family="wan2_2_i2v",
    defaults=DEFAULTS,
    negative_prompt=parent.RULES.negative_prompt,
    multiple=parent.SIZE_MULTIPLE,
    extra=parent.extra(boundary_ratio=0.9),
    images=(1, 1),
    masks_padding=False,
    guided=parent.guided,
    misfits=partial(misfits, in_channels=IN_CHANNELS),
)


def resolve(parameters: Mapping[str, Any], images: Sequence[InputImage] = ()) -> SamplingSpec:
    """See `base.sampling.resolve`. A size that is not given follows from the image's shape and `AREA`."""
    sampling.check_images(images, RULES)
    return parent.completed(sampling.resolve(target_size(parameters, frame_size(images[0])), RULES, images))


def frame_size(image: InputImage) -> tuple[int, int]:
    """(height, width) of about `AREA`, in the image's shape, as the stock pipelines have it."""
    ratio = image.height / image.width

    def side(pixels: float) -> int:
        return max(round(pixels) // parent.SIZE_MULTIPLE, 1) * parent.SIZE_MULTIPLE

    return side(math.sqrt(AREA * ratio)), side(math.sqrt(AREA / ratio))


def layout(spec: SamplingSpec) -> Layout:
    own = parent.layout(spec)
    return replace(own, conditions={"condition": (CONDITION_CHANNELS, *own.latent[1:])})
