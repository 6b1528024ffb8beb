"""The engine's transformer blocks with as few passes over memory as torch's own functions allow; no bit is another.

vllm-omni's block, and diffusers' in the trainer, make a new tensor for every product, sum, cast and half of a rotation.
Here they are written over one another where nothing else reads them, query and key are normalised and rotated together,
and what is rotated is put where the attention reads it. The order of operations and every rounding are those of the
trainer's block on a CPU, where torch's `rms_norm` is a sequence of operations. On a GPU the stock blocks stay.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from vllm_omni.diffusion.attention.backends.abstract import AttentionMetadata
from vllm_omni.diffusion.models.qwen_image.qwen_image_transformer import QwenImageCrossAttention, QwenImageTransformerBlock

from omni_rollout.diffusion.exact_ops import rotate_into


class LeanAttention(QwenImageCrossAttention):
    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        vid_freqs: torch.Tensor,
        txt_freqs: torch.Tensor,
        hidden_states_mask: torch.Tensor | None = None,
        encoder_hidden_states_mask: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.rope._forward_hooks:  # somebody, such as the parity probe, asks every module what it gives
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
        return self.to_out(attended[:, text:]), self.to_add_out(attended[:, :text])

    def _fill(self, place: torch.Tensor, projected: torch.Tensor, freqs: torch.Tensor, of_query: Any, of_key: Any) -> None:
        """[3, B, S, H, D] from [B, S, 3 H D]."""
        parts = projected.unflatten(-1, (3, -1, self.head_dim))
        normalised = _rms_normalised(parts[:, :, :2], torch.stack((of_query.weight, of_key.weight))[:, None], of_query.eps)
        rotate_into(place[:2].permute(1, 2, 0, 3, 4), normalised, freqs[:, None, None])
        place[2].copy_(parts[:, :, 2])


class LeanBlock(QwenImageTransformerBlock):
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
        image, text = image.mul_(image_gate).add_(hidden_states), text.mul_(text_gate).add_(encoder_hidden_states)
        scale, shift, gate = self._modulate(of_image[1], modulate_index)
        image = self.img_mlp(_modulated(self.img_norm2, image, scale, shift)).mul_(gate).add_(image)
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
