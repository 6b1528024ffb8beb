"""What Qwen-Image's sampling parameters mean: resolved here once, for the engine, the trainer and the records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from omni_rollout.models.base import sampling
from omni_rollout.models.base.sampling import Extra, Rules, Tokenizer
from omni_rollout.types import InputImage, Kind, Layout, SamplingSpec

if TYPE_CHECKING:  # sizes and records must not pay for torch
    from omni_rollout.diffusion.schedule import Schedule

PARENT: str | None = None
KIND: Kind = "image"
ROLLOUT_PIPELINE = "omni_rollout.models.qwen_image.rollout.QwenImageRolloutPipeline"
PIPELINE = "QwenImagePipeline"  # what model_index.json calls it
TRANSFORMER = "QwenImageTransformer2DModel"
COMPONENTS = ("scheduler", "text_encoder", "tokenizer", "transformer", "vae")
EXPERTS = ("transformer",)

DEFAULTS: dict[str, Any] = {
    "height": 1328,
    "width": 1328,
    "num_inference_steps": 50,
    "true_cfg_scale": 4.0,
    "prompt_width": 256,
    "noise_level": 0.7,
    "sde_type": "sde",
    "log_prob_form": "gaussian",
}
DEFAULT_NEGATIVE_PROMPT = " "  # Qwen-Image's own habit; an empty string would encode to nothing
SIZE_MULTIPLE = 16  # pixels: eightfold VAE, then 2x2 patches
EXTRA: dict[str, Extra] = {}
RULES = Rules(
    family="qwen_image",
    defaults=DEFAULTS,
    negative_prompt=DEFAULT_NEGATIVE_PROMPT,
    multiple=SIZE_MULTIPLE,
    extra=EXTRA,
)

TEMPLATE = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, "
    "spatial relationships of the objects and background:<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)
TEMPLATE_PREFIX_TOKENS = 34  # dropped from the embeddings; the transformer never sees them


def resolve(parameters: Mapping[str, Any], images: Sequence[InputImage] = ()) -> SamplingSpec:
    """See `base.sampling.resolve`."""
    return sampling.resolve(parameters, RULES, images)


def text_tokens(tokenizer: Tokenizer, text: str, spec: SamplingSpec) -> int:
    """How many text tokens the transformer sees for this text, padding not counted."""
    return len(tokenizer(TEMPLATE.format(text))["input_ids"]) - TEMPLATE_PREFIX_TOKENS


def layout(spec: SamplingSpec) -> Layout:
    rows, columns = spec.height // SIZE_MULTIPLE, spec.width // SIZE_MULTIPLE
    return Layout(latent=(rows * columns, None), media=(spec.height, spec.width, 3), grid=((1, rows, columns),))


def schedule(spec: SamplingSpec, scheduler: Mapping[str, Any]) -> Schedule:
    """Linear sigmas, shifted by the number of image tokens; `scheduler` is the checkpoint's scheduler_config."""
    from omni_rollout.diffusion.schedule import build_schedule, linear_sigmas, resolution_shift

    return build_schedule(
        scheduler, linear_sigmas(spec.num_inference_steps), mu=resolution_shift(scheduler, layout(spec).tokens)
    )


def expert(spec: SamplingSpec, step: int) -> int:
    """Position in `EXPERTS` of the network that computes this step."""
    return 0
