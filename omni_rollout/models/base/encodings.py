"""Both guidance branches of a prompt; and what prompts with input images were encoded to, so that a group encodes once.

The engine has such a cache for text; a picture bypasses it. Encoders are frozen, so what is kept never grows old.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch

from omni_rollout.models.base.velocity import Conditioning
from omni_rollout.types import Prompt, SamplingSpec

Encode = Callable[[Prompt, SamplingSpec], Conditioning]
# (text, width, what it is called) -> [width, D] and [width] bool
EncodeText = Callable[[str, int, str], tuple[torch.Tensor, torch.Tensor]]


def both_branches(
    prompt: Prompt, spec: SamplingSpec, encode: EncodeText, conditions: Mapping[str, torch.Tensor] | None = None
) -> Conditioning:
    """The prompt, and with guidance on the negative prompt, each at its own width."""
    embeds, mask = encode(prompt.text, spec.prompt_width, "prompt")
    negative_embeds, negative_mask = None, None
    if spec.negative_prompt is not None:
        negative_embeds, negative_mask = encode(spec.negative_prompt, spec.negative_prompt_width, "negative prompt")
    return Conditioning(
        prompt_embeds=embeds,
        prompt_embeds_mask=mask,
        negative_prompt_embeds=negative_embeds,
        negative_prompt_embeds_mask=negative_mask,
        spec=spec,
        conditions=conditions or {},
    )


def encoding_key(prompt: Prompt, spec: SamplingSpec) -> tuple[object, ...]:
    """All that an encoding may depend on: texts, pixels, widths and sizes. Not seed, steps, noise."""
    return (
        prompt.text,
        tuple(image.sha256 for image in prompt.images),
        spec.negative_prompt,
        spec.prompt_width,
        spec.negative_prompt_width,
        spec.height,
        spec.width,
        json.dumps(dict(spec.extra), sort_keys=True),
    )


class Encodings:
    """The last `places` encodings that were asked for."""

    def __init__(self, places: int) -> None:
        self._places = places
        self._kept: OrderedDict[tuple[object, ...], Conditioning] = OrderedDict()

    def take(self, prompt: Prompt, spec: SamplingSpec, encode: Encode) -> Conditioning:
        """The kept one, with this spec, or a new one by `encode`."""
        key = encoding_key(prompt, spec)
        found = self._kept.pop(key, None)
        if found is None:
            found = encode(prompt, spec)
        self._kept[key] = found
        while len(self._kept) > self._places:
            self._kept.popitem(last=False)
        return replace(found, spec=spec)
