"""What Wan2.2's sampling parameters mean. A video has two experts: the first takes the noisy steps, the second the rest."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from functools import partial
from typing import TYPE_CHECKING, Any

from omni_rollout.models.base import sampling
from omni_rollout.models.base.sampling import Extra, Rules, Tokenizer
from omni_rollout.models.wan2_2.checkpoint import misfits
from omni_rollout.types import InputImage, Kind, Layout, RequestError, SamplingSpec

if TYPE_CHECKING:  # sizes and records must not pay for torch
    from omni_rollout.diffusion.schedule import Schedule

PARENT: str | None = None
KIND: Kind = "video"
ROLLOUT_PIPELINE = "omni_rollout.models.wan2_2.rollout.WanRolloutPipeline"
PIPELINE = "WanPipeline"  # what model_index.json calls it
TRANSFORMER = "WanTransformer3DModel"
COMPONENTS = ("scheduler", "text_encoder", "tokenizer", "transformer", "transformer_2", "vae")
EXPERTS = ("transformer", "transformer_2")

DEFAULTS: dict[str, Any] = {
    "height": 480,
    "width": 832,
    "num_inference_steps": 40,
    "true_cfg_scale": 4.0,
    "prompt_width": 512,  # zeros after the text are attended to, so the width is part of what the model learned
    "noise_level": 0.7,
    "sde_type": "sde",
    "log_prob_form": "gaussian",
}
SIZE_MULTIPLE = 16  # pixels: eightfold VAE, then 2x2 patches
FRAME_MULTIPLE = 4  # frames to a latent one, after the first
LATENT_CHANNELS = 16
IN_CHANNELS = 16  # that the transformer reads


def extra(boundary_ratio: float) -> dict[str, Extra]:
    """Parameters of the family; the ratio is what its checkpoints were trained with."""

    def above_zero(value: float) -> bool:
        return 0 < value < math.inf

    return {
        "frames": Extra(
            default=81,
            types=(int,),
            check=lambda value: value >= 1 and value % FRAME_MULTIPLE == 1,
            expected="1, 5, 9 and so on: the VAE makes four frames of a latent one, after the first",
        ),
        "flow_shift": Extra(default=5.0, types=(int, float), check=above_zero, expected="a finite number above 0"),
        "boundary_ratio": Extra(
            default=boundary_ratio,
            types=(int, float),
            check=lambda value: 0 < value < 1,
            expected="a number between 0 and 1: the sigma below which the second expert computes",
        ),
        "true_cfg_scale_2": Extra(
            types=(int, float), check=lambda value: 0 <= value < math.inf, expected="a finite number of 0 or more"
        ),
        "boundary_step": Extra(types=(int,)),
    }


def guided(true_cfg_scale: float, given: Mapping[str, Any]) -> bool:
    """Whether either expert takes negative passes."""
    second = given["true_cfg_scale_2"]
    return max(true_cfg_scale, true_cfg_scale if second is None else second) > 1


RULES = Rules(
    family="wan2_2",
    defaults=DEFAULTS,
    negative_prompt="",
    multiple=SIZE_MULTIPLE,
    extra=extra(boundary_ratio=0.875),
    masks_padding=False,
    guided=guided,
    misfits=partial(misfits, in_channels=IN_CHANNELS),
)


def resolve(parameters: Mapping[str, Any], images: Sequence[InputImage] = ()) -> SamplingSpec:
    """See `base.sampling.resolve`. The second expert's scale is the first's, where it is not given."""
    return completed(sampling.resolve(parameters, RULES, images))


def completed(spec: SamplingSpec) -> SamplingSpec:
    """With what of `extra` follows from the rest.

    Raises:
        RequestError: another boundary_step than follows.
    """
    given = spec.extra
    shift, ratio, second = (given[name] for name in ("flow_shift", "boundary_ratio", "true_cfg_scale_2"))
    boundary = boundary_step(spec.num_inference_steps, shift, ratio)
    if given["boundary_step"] not in (None, boundary):
        raise RequestError(
            f"sampling.extra.boundary_step={given['boundary_step']}: {spec.num_inference_steps} steps, flow_shift={shift} and "
            f"boundary_ratio={ratio} make it {boundary}; leave it out"
        )
    own = {
        "frames": given["frames"],
        "flow_shift": float(shift),
        "boundary_ratio": float(ratio),
        "true_cfg_scale_2": float(spec.true_cfg_scale if second is None else second),
        "boundary_step": boundary,
    }
    return replace(spec, extra=own)


def boundary_step(steps: int, flow_shift: float, boundary_ratio: float) -> int:
    """The first step of the second expert: the first whose sigma lies below the boundary.

    In fractions, with the decimals as they are written: a sigma may lie on the boundary itself, where the last bit of a float
    would decide. Whoever needs it later reads it from the spec.
    """
    shift, boundary = Fraction(str(flow_shift)), Fraction(str(boundary_ratio))
    linear = (Fraction(steps - step, steps) for step in range(steps))
    sigmas = (shift * sigma / (1 + (shift - 1) * sigma) for sigma in linear)
    return next((step for step, sigma in enumerate(sigmas) if sigma < boundary), steps)


def clean(text: str) -> str:
    """As both stock pipelines hand it to the tokenizer."""
    return " ".join(text.split())


def text_tokens(tokenizer: Tokenizer, text: str, spec: SamplingSpec) -> int:
    """How many of the tokens that the transformer sees are of this text; the others are zeros, which it attends to as well."""
    return len(tokenizer(clean(text))["input_ids"])


def layout(spec: SamplingSpec) -> Layout:
    frames = spec.extra["frames"]
    latent_frames = 1 + (frames - 1) // FRAME_MULTIPLE
    return Layout(
        latent=(LATENT_CHANNELS, latent_frames, spec.height // 8, spec.width // 8),
        media=(frames, spec.height, spec.width, 3),
        grid=((latent_frames, spec.height // SIZE_MULTIPLE, spec.width // SIZE_MULTIPLE),),
        frames=frames,
    )


def schedule(spec: SamplingSpec, scheduler: Mapping[str, Any]) -> Schedule:
    """Linear sigmas, shifted by `flow_shift`; nothing of the checkpoint's UniPC, whose steps have no density."""
    from omni_rollout.diffusion.schedule import build_schedule, linear_sigmas

    return build_schedule(scheduler, linear_sigmas(spec.num_inference_steps), shift=spec.extra["flow_shift"])


def expert(spec: SamplingSpec, step: int) -> int:
    """Position in `EXPERTS` of the network that computes this step."""
    return int(step >= spec.extra["boundary_step"])
