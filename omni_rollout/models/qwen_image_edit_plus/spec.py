"""What Qwen-Image-Edit-Plus's sampling parameters mean: Qwen-Image-Edit's, for several input images in an order.

A size that is not given follows from the first image; diffusers takes the last.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from omni_rollout.models.base.sampling import Tokenizer
from omni_rollout.models.qwen_image_edit import spec as parent
from omni_rollout.models.qwen_image_edit.spec import COMPONENTS, DEFAULTS, EXPERTS, KIND, TRANSFORMER, expert, layout, schedule
from omni_rollout.types import InputImage, SamplingSpec

__all__ = ["COMPONENTS", "DEFAULTS", "EXPERTS", "KIND", "TRANSFORMER", "expert", "layout", "schedule"]

PARENT: str | None = "qwen_image_edit"
ROLLOUT_PIPELINE = "omni_rollout.models.qwen_image_edit_plus.rollout.QwenImageEditPlusRolloutPipeline"
PIPELINE = "QwenImageEditPlusPipeline"

MOST_IMAGES = 4  # what the published checkpoints stay within
EXTRA = parent.own_parameters(vision_area=384 * 384)
RULES = replace(parent.RULES, family="qwen_image_edit_plus", extra=EXTRA, images=(1, MOST_IMAGES))
WARM_UP_EXTRA = parent.WARM_UP_EXTRA


def resolve(parameters: Mapping[str, Any], images: Sequence[InputImage] = ()) -> SamplingSpec:
    """See `base.sampling.resolve`."""
    return parent.resolve_by(RULES, parameters, images)


def text_tokens(tokenizer: Tokenizer, text: str, spec: SamplingSpec) -> int:
    """How many text tokens the transformer sees for this text, those of the input images counted, padding not."""
    numbers = range(1, len(spec.extra["vision_sizes"]) + 1)
    pictures = "".join(f"Picture {number}: {parent.PICTURE}" for number in numbers)
    return parent.tokens_of(tokenizer, parent.TEMPLATE.format(pictures, text), spec)
