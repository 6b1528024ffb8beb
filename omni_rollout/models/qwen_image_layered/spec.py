"""What Qwen-Image-Layered's sampling parameters mean. Sizes follow from the input image, unless height and width are given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from omni_rollout.models.base import sampling
from omni_rollout.models.base.image_sizes import ALIGNMENT, size_of_area, target_size
from omni_rollout.models.base.sampling import Extra, Rules
from omni_rollout.models.qwen_image import spec as parent
from omni_rollout.models.qwen_image.spec import EXPERTS, TRANSFORMER, expert, text_tokens
from omni_rollout.types import InputImage, Kind, Layout, SamplingSpec

if TYPE_CHECKING:
    from omni_rollout.diffusion.schedule import Schedule

__all__ = ["EXPERTS", "TRANSFORMER", "expert", "text_tokens"]

PARENT: str | None = "qwen_image"
KIND: Kind = "layers"
ROLLOUT_PIPELINE = "omni_rollout.models.qwen_image_layered.rollout.QwenImageLayeredRolloutPipeline"
PIPELINE = "QwenImageLayeredPipeline"
COMPONENTS = ("processor", *parent.COMPONENTS)

DEFAULTS: dict[str, Any] = {**parent.DEFAULTS, "height": None, "width": None}  # None: they follow from the input image
EXTRA = {
    "layers": Extra(default=4, types=(int,), check=lambda value: value >= 1, expected="1 or more"),
    "resolution": Extra(  # of a square; height and width have its area, where they are not given. Published: 640 and 1024
        default=640,
        types=(int,),
        check=lambda value: value >= ALIGNMENT and value % ALIGNMENT == 0,
        expected=f"a multiple of {ALIGNMENT} pixels",
    ),
    "cfg_normalize": Extra(default=False, types=(bool,)),  # guidance keeps the positive branch's norm
}
RULES = Rules(
    family="qwen_image_layered",
    defaults=DEFAULTS,
    negative_prompt=parent.DEFAULT_NEGATIVE_PROMPT,
    multiple=parent.SIZE_MULTIPLE,
    extra=EXTRA,
    images=(1, 1),
    empty_prompt=False,  # the published pipeline lets its text encoder write a caption, by chance and without a record
)
WARM_UP_EXTRA = {"layers": 1}


def resolve(parameters: Mapping[str, Any], images: Sequence[InputImage] = ()) -> SamplingSpec:
    """See `base.sampling.resolve`."""
    sampling.check_images(images, RULES)
    extra = sampling.resolve_extra(parameters.get("extra") or {}, RULES)
    sized = target_size(parameters, size_of_area(extra["resolution"] ** 2, images[0]))
    return sampling.resolve(sized, RULES, images)


def layout(spec: SamplingSpec) -> Layout:
    """Frame 0 is the picture that the layers make together: denoised like them, not decoded. The input image comes last."""
    rows, columns = spec.height // parent.SIZE_MULTIPLE, spec.width // parent.SIZE_MULTIPLE
    layers = spec.extra["layers"]
    return Layout(
        latent=((layers + 1) * rows * columns, None),
        media=(layers, spec.height, spec.width, 4),
        grid=((1, rows, columns),) * (layers + 2),
        conditions={"image_latents": (rows * columns, None)},
        frames=layers + 1,
    )


def schedule(spec: SamplingSpec, scheduler: Mapping[str, Any]) -> Schedule:
    """As Qwen-Image's, but shifted by the number of the input image's tokens, and by another formula."""
    from omni_rollout.diffusion.schedule import build_schedule, falling_sigmas

    rows, columns = spec.height // parent.SIZE_MULTIPLE, spec.width // parent.SIZE_MULTIPLE
    return build_schedule(scheduler, falling_sigmas(spec.num_inference_steps), mu=(rows * columns / 256) ** 0.5)
