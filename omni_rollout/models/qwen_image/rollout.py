"""Qwen-Image inside vllm-omni's engine: text, noise, network and decoding; the loop is `base/rollout.py`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from vllm_omni.diffusion.models.qwen_image import QwenImagePipeline
from vllm_omni.diffusion.models.qwen_image.qwen_image_transformer import ColumnParallelApproxGELU

from omni_rollout.diffusion import exact_ops
from omni_rollout.diffusion.activations import exact_gelu, install_activations
from omni_rollout.models.base.encodings import both_branches
from omni_rollout.models.base.images import open_image
from omni_rollout.models.base.rollout import RolloutMixin, to_uint8
from omni_rollout.models.base.velocity import Conditioning, pad_to_width
from omni_rollout.models.qwen_image.blocks import install_lean_blocks
from omni_rollout.models.qwen_image.decoder import install_frame_convs
from omni_rollout.models.qwen_image.policy import load_policy, network
from omni_rollout.types import Prompt, SamplingSpec


class ExactApproxGELU(ColumnParallelApproxGELU):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return exact_gelu(self.proj(x))


class QwenTransformer:
    """How every pipeline of Qwen-Image's transformer installs and calls it, and encodes what it is told. The first base."""

    mode: ClassVar[str] = "RGB"  # PIL's, of input images
    encode_prompt: Any
    tokenizer_max_length: int
    _pack_latents: Any
    device: Any
    transformer: Any
    vae: Any
    dtype: torch.dtype
    parity: str

    def install(self, model: str) -> None:
        if self.parity != "reference":
            install_frame_convs(self.vae.decoder)
            if torch.device(self.device).type == "cpu":  # on a GPU torch's rms_norm may be one kernel, and round otherwise
                install_lean_blocks(self.transformer)
        if self.parity == "exact":
            exact_ops.install_linears(self.transformer, self.dtype)  # vLLM's own have theirs: rollout/platform/linear.py
            install_activations(self.transformer)
            for layer in self.transformer.modules():
                if type(layer) is ColumnParallelApproxGELU:
                    layer.__class__ = ExactApproxGELU
        if self.parity == "reference":
            in_channels = self.transformer.in_channels
            reference: Any = load_policy(model, self.dtype, self.parity)
            self.transformer = reference.to(self.dtype).requires_grad_(False)
            self.transformer.in_channels = in_channels

    def call(self, *, expert: int, encoder_hidden_states: torch.Tensor, **inputs: Any) -> torch.Tensor:
        if self.parity == "reference":
            return network(self.transformer, encoder_hidden_states=encoder_hidden_states, **inputs)
        # RoPE's length is the width the transformer sees, never the number of valid tokens.
        widths = [encoder_hidden_states.shape[1]] * encoder_hidden_states.shape[0]
        return self.transformer(
            encoder_hidden_states=encoder_hidden_states, txt_seq_lens=widths, guidance=None, attention_kwargs={}, **inputs
        )[0]

    def encode(self, prompt: Prompt, spec: SamplingSpec) -> Conditioning:
        images = [open_image(image, self.mode) for image in prompt.images]
        encode = partial(self._encode, shown=self.shown(images, spec))
        return both_branches(prompt, spec, encode, self.conditions(images, spec))

    def _encode(self, text: str, width: int, what: str, shown: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        embeds, mask = self.encode_prompt(prompt=text, max_sequence_length=self.tokenizer_max_length, **shown)
        return pad_to_width(embeds[0].to(self.dtype), mask[0], width, what)

    def shown(self, images: Sequence[Image.Image], spec: SamplingSpec) -> dict[str, Any]:
        """What the text encoder is shown beside a text, as arguments of the stock `encode_prompt`."""
        return {}

    def conditions(self, images: Sequence[Image.Image], spec: SamplingSpec) -> dict[str, torch.Tensor]:
        """See `Layout.conditions`."""
        return {}

    def encode_target(self, image: Image.Image, spec: SamplingSpec) -> torch.Tensor:
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None, :, None].float() / 255 * 2 - 1
        latents = self.vae.encode(pixels.to(self.device, self.vae.dtype), return_dict=False)[0].mode().float()
        config = self.vae.config
        mean, std = (
            torch.tensor(numbers, device=latents.device).view(1, -1, 1, 1, 1)
            for numbers in (config.latents_mean, config.latents_std)
        )
        _, channels, _, rows, columns = latents.shape
        return self._pack_latents((latents - mean) / std, 1, channels, rows, columns)


class QwenImageRolloutPipeline(QwenTransformer, RolloutMixin, QwenImagePipeline):
    family: ClassVar[str] = "qwen_image"

    def noise(self, spec: SamplingSpec, generator: torch.Generator) -> torch.Tensor:
        channels = self.transformer.in_channels // 4
        return self.prepare_latents(1, channels, spec.height, spec.width, torch.float32, self.device, generator)

    def decode(self, latents: torch.Tensor, spec: SamplingSpec) -> torch.Tensor:
        decoded = self._decode_latents(latents, spec.height, spec.width, output_type="pt").output
        assert isinstance(decoded, torch.Tensor)
        return to_uint8(decoded).permute(0, 2, 3, 1)
