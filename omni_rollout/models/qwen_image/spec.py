"""What Qwen-Image's sampling parameters mean: resolved here once, for the engine, the trainer and the records."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from omni_rollout.types import RequestError, SamplingSpec

ROLLOUT_PIPELINE = "omni_rollout.models.qwen_image.rollout.QwenImageRolloutPipeline"

DEFAULTS: dict[str, Any] = {
    "height": 1328,
    "width": 1328,
    "num_inference_steps": 50,
    "true_cfg_scale": 4.0,
    "noise_level": 0.7,
    "sde_type": "sde",
    "log_prob_form": "gaussian",
}
ALIASES = {"cfg_scale": "true_cfg_scale"}
OTHER_KEYS = ("negative_prompt", "step_indices", "prompt_width", "negative_prompt_width")
DEFAULT_NEGATIVE_PROMPT = " "  # Qwen-Image's own habit; an empty string would encode to nothing
SIZE_MULTIPLE = 16  # pixels: eightfold VAE, then 2x2 patches

TEMPLATE = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, "
    "spatial relationships of the objects and background:<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)
TEMPLATE_PREFIX_TOKENS = 34  # dropped from the embeddings; the transformer never sees them


class Tokenizer(Protocol):
    def __call__(self, text: str) -> Mapping[str, Any]: ...


def text_tokens(tokenizer: Tokenizer, prompt: str) -> int:
    """How many text tokens the transformer sees for this prompt, padding not counted."""
    return len(tokenizer(TEMPLATE.format(prompt))["input_ids"]) - TEMPLATE_PREFIX_TOKENS


def image_tokens(height: int, width: int) -> int:
    return (height // SIZE_MULTIPLE) * (width // SIZE_MULTIPLE)


def resolve(parameters: Mapping[str, Any]) -> SamplingSpec:
    """Makes every number explicit. A key that is absent or None takes the family's default; zero stays zero.

    Args:
        parameters: keys of `SamplingSpec`, or the alias `cfg_scale`. `step_indices` None: all steps but the last.

    Raises:
        RequestError: an unknown key, or a value that cannot be served, with what was given and what to do.
    """
    given = {ALIASES.get(key, key): value for key, value in parameters.items() if value is not None}
    for key in given:
        if key not in DEFAULTS and key not in OTHER_KEYS:
            near = difflib.get_close_matches(key, [*DEFAULTS, *OTHER_KEYS, *ALIASES], n=1)
            raise RequestError(f"sampling parameter {key!r}: not known" + (f"; did you mean {near[0]}?" if near else ""))
    if "prompt_width" not in given:
        raise RequestError("prompt_width: not given; set collate.prompt_width to the text width of every prompt")
    values = {**DEFAULTS, **given}
    check(values)
    steps = values["num_inference_steps"]
    stochastic = values["sde_type"] != "ode" and values["noise_level"] > 0
    guided = values["true_cfg_scale"] > 1
    return SamplingSpec(
        height=values["height"],
        width=values["width"],
        num_inference_steps=steps,
        true_cfg_scale=float(values["true_cfg_scale"]),
        negative_prompt=values.get("negative_prompt", DEFAULT_NEGATIVE_PROMPT) if guided else None,
        noise_level=float(values["noise_level"]),
        sde_type=values["sde_type"] if stochastic else "ode",
        log_prob_form=values["log_prob_form"],
        step_indices=_stochastic_steps(values.get("step_indices"), steps) if stochastic else (),
        prompt_width=values["prompt_width"],
        negative_prompt_width=values.get("negative_prompt_width", values["prompt_width"]),
    )


def check(values: Mapping[str, Any]) -> None:
    for side in ("height", "width"):
        size = values[side]
        if size < SIZE_MULTIPLE or size % SIZE_MULTIPLE:
            near = max(SIZE_MULTIPLE, round(size / SIZE_MULTIPLE) * SIZE_MULTIPLE)
            raise RequestError(f"{side}={size}: expected a multiple of {SIZE_MULTIPLE} pixels; the nearest is {near}")
    if values["num_inference_steps"] < 2:
        raise RequestError(f"num_inference_steps={values['num_inference_steps']}: expected 2 or more")
    if values["noise_level"] < 0:
        raise RequestError(f"noise_level={values['noise_level']}: expected 0 (deterministic) or more")
    if values["sde_type"] == "cps" and values["noise_level"] > 1:
        raise RequestError(f"noise_level={values['noise_level']}: cps expects 0 to 1")
    for width in ("prompt_width", "negative_prompt_width"):
        if width in values and values[width] < 1:
            raise RequestError(f"{width}={values[width]}: expected 1 or more text tokens")


def _stochastic_steps(step_indices: Sequence[int] | None, steps: int) -> tuple[int, ...]:
    chosen = tuple(range(steps - 1)) if step_indices is None else tuple(int(index) for index in step_indices)
    # The last step ends at sigma 0: with noise there, the image itself would be noisy, so it is always deterministic.
    if not chosen or chosen != tuple(range(chosen[0], chosen[0] + len(chosen))) or chosen[0] < 0 or chosen[-1] >= steps - 1:
        raise RequestError(
            f"stochastic steps {list(chosen)} of {steps}: expected neighbouring indices from 0 to {steps - 2} "
            "(the last step is deterministic); change sampling.sde_window_range or sde_window_size"
        )
    return chosen
