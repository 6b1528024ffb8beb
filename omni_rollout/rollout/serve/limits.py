"""What one request may ask of the engine: refused by the limit's name before it gets there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from omni_rollout.config import ServeConfig
from omni_rollout.models import family_module
from omni_rollout.models.base.image_sizes import is_sizes
from omni_rollout.rollout.serve.errors import BadRequest
from omni_rollout.types import SamplingSpec


def check_text(text: str | None, limits: ServeConfig, param: str) -> None:
    if text is not None and len(text) > limits.max_prompt_chars:
        _past(param, len(text), "max_prompt_chars", limits.max_prompt_chars, "characters")
    if text is not None and any(character in text for character in "\x00\ud800"):
        raise BadRequest(f"{param}: holds a character that cannot be printed", param)


def check_given(given: Mapping[str, Any], limits: ServeConfig, where: str) -> None:
    """Before it is resolved, which takes the longer the more steps there are. Raises BadRequest."""
    if (steps := given.get("num_inference_steps") or 0) > limits.max_steps:
        _past(f"{where}num_inference_steps", steps, "max_steps", limits.max_steps, "steps")
    for param in ("prompt_width", "negative_prompt_width"):
        if (width := given.get(param) or 0) > limits.max_prompt_width:
            _past(f"{where}{param}", width, "max_prompt_width", limits.max_prompt_width, "text tokens")
    check_text(given.get("negative_prompt"), limits, f"{where}negative_prompt")


def check_spec(spec: SamplingSpec, limits: ServeConfig, where: str) -> None:
    """Raises BadRequest: more pixels or frames than this server allows."""
    if spec.height * spec.width > limits.max_pixels:
        _past(f"{where}height", spec.height * spec.width, "max_pixels", limits.max_pixels, "pixels")
    for name, value in spec.extra.items():
        if isinstance(value, list) and value and is_sizes(value):  # of input images, as they are scaled
            pixels = max(height * width for height, width in value)
            if pixels > limits.max_pixels:
                _past(f"{where}extra.{name}", pixels, "max_pixels", limits.max_pixels, "pixels")
    media = family_module(spec.family, "spec").layout(spec).media
    if len(media) == 4 and media[0] > limits.max_frames:
        _past(f"{where}extra", media[0], "max_frames", limits.max_frames, "frames or layers")


def _past(param: str, value: int, limit: str, most: int, unit: str) -> None:
    raise BadRequest(f"{param}: {value} {unit}, this server allows {most} (serve.{limit})", param)
