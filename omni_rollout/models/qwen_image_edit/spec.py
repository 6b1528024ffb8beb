"""What Qwen-Image-Edit's sampling parameters mean. Sizes follow from the input images, unless they are given.

An input image is seen twice: by the text encoder's vision tower, whose tokens are part of the text's width, and by the VAE,
whose latents follow the target's. The negative prompt is encoded with the same images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from omni_rollout.models.base import sampling
from omni_rollout.models.base.image_sizes import is_sizes, sizes_of, target_size
from omni_rollout.models.base.qwen_processor import image_tokens
from omni_rollout.models.base.sampling import Extra, Rules, Tokenizer
from omni_rollout.models.qwen_image import spec as parent
from omni_rollout.models.qwen_image.spec import EXPERTS, KIND, TRANSFORMER, expert
from omni_rollout.types import InputImage, Layout, SamplingSpec

__all__ = ["EXPERTS", "KIND", "TRANSFORMER", "expert", "schedule"]

PARENT: str | None = "qwen_image"
ROLLOUT_PIPELINE = "omni_rollout.models.qwen_image_edit.rollout.QwenImageEditRolloutPipeline"
PIPELINE = "QwenImageEditPipeline"
COMPONENTS = ("processor", *parent.COMPONENTS)

DEFAULTS: dict[str, Any] = {**parent.DEFAULTS, "height": None, "width": None}  # None: they follow from the first input image
AREA = 1024 * 1024  # pixels


def own_parameters(vision_area: int) -> dict[str, Extra]:
    multiple = parent.SIZE_MULTIPLE
    area = {"types": (int,), "check": lambda value: value >= 1, "expected": "a number of pixels"}
    return {
        # What each input image is scaled to, in its own aspect ratio, where its sizes are not given: for the VAE, for the
        # text encoder.
        "vae_area": Extra(default=AREA, **area),
        "vision_area": Extra(default=vision_area, **area),
        # The sizes themselves: [height, width] of each input image.
        "image_sizes": Extra(
            types=(list,),
            check=lambda value: is_sizes(value, multiple),
            expected=f"[[height, width], ...] of the input images, multiples of {multiple}",
        ),
        "vision_sizes": Extra(types=(list,), check=is_sizes, expected="[[height, width], ...] of the input images"),
    }


EXTRA = own_parameters(vision_area=AREA)
RULES = Rules(
    family="qwen_image_edit",
    defaults=DEFAULTS,
    negative_prompt=parent.DEFAULT_NEGATIVE_PROMPT,
    multiple=parent.SIZE_MULTIPLE,
    extra=EXTRA,
    images=(1, 1),
)
WARM_UP_EXTRA = {"image_sizes": [[32, 32]], "vision_sizes": [[32, 32]]}

TEMPLATE = (
    "<|im_start|>system\nDescribe the key features of the input image (color, shape, size, texture, objects, background), then "
    "explain how the user's text instruction should alter or modify the image. Generate a new image that meets the user's "
    "requirements while maintaining consistency with the original input where appropriate.<|im_end|>\n<|im_start|>user\n"
    "{}{}<|im_end|>\n<|im_start|>assistant\n"
)
TEMPLATE_PREFIX_TOKENS = 64
PICTURE = "<|vision_start|><|image_pad|><|vision_end|>"

schedule = parent.schedule


def resolve(parameters: Mapping[str, Any], images: Sequence[InputImage] = ()) -> SamplingSpec:
    """See `base.sampling.resolve`."""
    return resolve_by(RULES, parameters, images)


def resolve_by(rules: Rules, parameters: Mapping[str, Any], images: Sequence[InputImage]) -> SamplingSpec:
    """By these rules, whose family has this one's parameters."""
    sampling.check_images(images, rules)
    extra = sampling.resolve_extra(parameters.get("extra") or {}, rules)
    extra["image_sizes"] = sizes_of(images, extra["image_sizes"], extra["vae_area"], "image_sizes")
    extra["vision_sizes"] = sizes_of(images, extra["vision_sizes"], extra["vision_area"], "vision_sizes")
    height, width = extra["image_sizes"][0]
    return sampling.resolve({**target_size(parameters, (height, width)), "extra": extra}, rules, images)


def text_tokens(tokenizer: Tokenizer, text: str, spec: SamplingSpec) -> int:
    """How many text tokens the transformer sees for this text, those of the input images counted, padding not."""
    return tokens_of(tokenizer, TEMPLATE.format(PICTURE, text), spec)


def tokens_of(tokenizer: Tokenizer, filled: str, spec: SamplingSpec) -> int:
    """Of a template that is filled in, with one token for each input image."""
    checkpoint = getattr(tokenizer, "name_or_path", "")
    pictures = [image_tokens(checkpoint, *size) for size in spec.extra["vision_sizes"]]
    return len(tokenizer(filled)["input_ids"]) - TEMPLATE_PREFIX_TOKENS - len(pictures) + sum(pictures)


def layout(spec: SamplingSpec) -> Layout:
    own, multiple = parent.layout(spec), parent.SIZE_MULTIPLE
    beside = tuple((1, height // multiple, width // multiple) for height, width in spec.extra["image_sizes"])
    tokens = sum(rows * columns for _, rows, columns in beside)
    return Layout(latent=own.latent, media=own.media, grid=(*own.grid, *beside), conditions={"image_latents": (tokens, None)})
