"""Qwen-Image inside vllm-omni's engine: text, noise, network and decoding; the loop is `base/rollout.py`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import nn
from vllm_omni.diffusion.attention.backends.abstract import AttentionMetadata
from vllm_omni.diffusion.models.qwen_image import QwenImagePipeline
from vllm_omni.diffusion.models.qwen_image.qwen_image_transformer import (
    ColumnParallelApproxGELU,
    QwenImageCrossAttention,
    QwenImageTransformerBlock,
)

from omni_rollout.diffusion import exact_ops
from omni_rollout.diffusion.activations import exact_gelu, install_activations
from omni_rollout.diffusion.exact_ops import SHARED_OUT, rotate_into
from omni_rollout.models.base.encodings import both_branches
from omni_rollout.models.base.images import open_image
from omni_rollout.models.base.rollout import RolloutMixin, to_uint8
from omni_rollout.models.base.velocity import Conditioning, pad_to_width
from omni_rollout.models.qwen_image.decoder import install_frame_convs
from omni_rollout.models.qwen_image.policy import load_policy, network
from omni_rollout.types import Prompt, SamplingSpec


class ExactApproxGELU(ColumnParallelApproxGELU):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return exact_gelu(self.proj(x))


class LeanAttention(QwenImageCrossAttention):
    """With few passes over memory: the stock one makes a new tensor for every product, sum, cast and half of a rotation.

    Query and key are normalised and rotated together and put where the attention reads them. The order of operations and every
    rounding are those of the trainer on a CPU, where torch's `rms_norm` is a sequence of operations. `hidden_states_mask` is of
    sequence parallelism, which no engine of ours has.
    """

    text_ends = False  # whether nobody reads what becomes of the text: after the last block

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        vid_freqs: torch.Tensor,
        txt_freqs: torch.Tensor,
        hidden_states_mask: torch.Tensor | None = None,
        encoder_hidden_states_mask: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.is_watched:
            return super().forward(
                hidden_states, encoder_hidden_states, vid_freqs, txt_freqs, hidden_states_mask, encoder_hidden_states_mask
            )
        batch, image, _ = hidden_states.shape
        text = encoder_hidden_states.shape[1]
        joint = hidden_states.new_empty(3, batch, text + image, self.query_num_heads, self.head_dim)  # query, key, value
        of_text, of_image = self.add_kv_proj(encoder_hidden_states)[0], self.to_qkv(hidden_states)[0]
        self._fill(joint[:, :, :text], of_text, txt_freqs, self.norm_added_q, self.norm_added_k)
        self._fill(joint[:, :, text:], of_image, vid_freqs, self.norm_q, self.norm_k)
        metadata = None
        if encoder_hidden_states_mask is not None:
            beside = encoder_hidden_states_mask.new_ones(batch, image)
            metadata = AttentionMetadata(attn_mask=torch.cat([encoder_hidden_states_mask, beside], dim=1))
        attended = self.attn(*joint, metadata).flatten(2, 3).to(hidden_states.dtype)
        image_out, text_out = attended[:, text:], attended[:, :text]
        return self.to_out(image_out), text_out if self.text_ends else self.to_add_out(text_out)

    @property
    def is_watched(self) -> bool:
        """Whether somebody, such as the parity probe, asks every module what it gives."""
        return bool(self.rope._forward_hooks)

    def _fill(self, place: torch.Tensor, projected: torch.Tensor, freqs: torch.Tensor, of_query: Any, of_key: Any) -> None:
        """[3, B, S, H, D] from [B, S, 3 H D]."""
        parts = projected.unflatten(-1, (3, -1, self.head_dim))
        weights, each = torch.stack((of_query.weight, of_key.weight))[:, None], parts[:, :, 0].numel()
        apart = each < SHARED_OUT <= 2 * each
        for some in (slice(0, 1), slice(1, 2)) if apart else (slice(0, 2),):
            normalised = _rms_normalised(parts[:, :, some], weights[some], of_query.eps)
            rotate_into(place[some].permute(1, 2, 0, 3, 4), normalised, freqs[:, None, None])
        place[2].copy_(parts[:, :, 2])


class LeanBlock(QwenImageTransformerBlock):
    """The stock one, what nobody else reads being written over, and left out in the last block: its text."""

    attn: LeanAttention

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        encoder_hidden_states_mask: torch.Tensor | None,
        temb: torch.Tensor,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor],
        joint_attention_kwargs: dict[str, Any] | None = None,
        modulate_index: Any = None,
        hidden_states_mask: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        of_image = self.img_mod(temb).chunk(2, dim=-1)
        of_text = self.txt_mod(temb.chunk(2, dim=0)[0] if self.zero_cond_t else temb).chunk(2, dim=-1)
        image_scale, image_shift, image_gate = self._modulate(of_image[0], modulate_index)
        text_scale, text_shift, text_gate = self._modulate(of_text[0])
        image, text = self.attn(
            hidden_states=_modulated(self.img_norm1, hidden_states, image_scale, image_shift),
            encoder_hidden_states=_modulated(self.txt_norm1, encoder_hidden_states, text_scale, text_shift),
            vid_freqs=image_rotary_emb[0],
            txt_freqs=image_rotary_emb[1],
            encoder_hidden_states_mask=encoder_hidden_states_mask,
        )
        image = image.mul_(image_gate).add_(hidden_states)
        scale, shift, gate = self._modulate(of_image[1], modulate_index)
        image = self.img_mlp(_modulated(self.img_norm2, image, scale, shift)).mul_(gate).add_(image)
        if self.attn.text_ends and not self.attn.is_watched:
            return encoder_hidden_states, image
        text = text.mul_(text_gate).add_(encoder_hidden_states)
        scale, shift, gate = self._modulate(of_text[1])
        text = self.txt_mlp(_modulated(self.txt_norm2, text, scale, shift)).mul_(gate).add_(text)
        return text, image


def _modulated(norm: Any, x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    return norm.layernorm(x).mul_(1 + scale).add_(shift)


def _rms_normalised(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """As torch's `rms_norm`: in fp32, rounded once, after the weight. Contiguous."""
    wide = x.float()
    factor = wide.pow(2).mean(-1, keepdim=True).add_(eps).rsqrt_()
    wide = wide * factor if wide is x else wide.mul_(factor)
    return wide.mul_(weight).to(x.dtype)


def install_lean_blocks(transformer: nn.Module) -> None:
    """On a CPU, for inference alone: what a gradient would need is written over."""
    for layer in transformer.modules():
        if type(layer) is QwenImageTransformerBlock:
            layer.__class__ = LeanBlock
        elif type(layer) is QwenImageCrossAttention:
            layer.__class__ = LeanAttention
    last: Any = transformer.transformer_blocks
    last[-1].attn.text_ends = True


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
