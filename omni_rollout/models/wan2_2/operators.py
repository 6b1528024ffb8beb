"""diffusers' Wan transformer, rounding where vllm-omni's does.

diffusers keeps modulation, gates, time embedding and RoPE in fp32 whatever the model computes in; the engine computes all of
them in the model's dtype. Both are here: `wide` is diffusers' way. As in `diffusion/exact_ops.py`, modules get other classes
and keep their parameters' names, the master weights stay fp32 and are cast as they are used.
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.normalization import FP32LayerNorm
from diffusers.models.transformers import transformer_wan as stock
from torch import nn

from omni_rollout.diffusion.activations import exact_silu, install_activations
from omni_rollout.diffusion.attention import exact_attention
from omni_rollout.diffusion.exact_ops import install_linears
from omni_rollout.diffusion.products import exact_linear


class ExactRMSNorm(nn.RMSNorm):
    """Over all heads together, in fp32, rounded once."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        assert self.eps is not None
        normalised = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return (self.weight.to(x.dtype).float() * normalised).to(x.dtype)


class ExactLayerNorm(FP32LayerNorm):
    """In fp32, of weights that are rounded to the dtype of what is normalised."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        def cast(parameter: torch.Tensor | None) -> torch.Tensor | None:
            return None if parameter is None else parameter.to(inputs.dtype).float()

        wide = F.layer_norm(inputs.float(), self.normalized_shape, cast(self.weight), cast(self.bias), self.eps)
        return wide.to(inputs.dtype)


class PatchProduct:
    """A convolution whose kernel is its stride, as one product of patches with a weight. First base of such a layer."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    kernel_size: Any
    in_channels: int
    out_channels: int
    compute_dtype: torch.dtype

    @property
    def in_features(self) -> int:
        return self.in_channels * prod(self.kernel_size)

    @property
    def out_features(self) -> int:
        return self.out_channels

    def effective_weight(self) -> torch.Tensor:
        return self.weight.to(self.compute_dtype)

    def effective_bias(self) -> torch.Tensor | None:
        return None if self.bias is None else self.bias.to(self.compute_dtype)

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """[B, C, F, H, W] -> [B, C', F / f, H / h, W / w] for a kernel of [f, h, w]."""
        patches = x
        for axis, size in enumerate(self.kernel_size, start=2):
            patches = patches.unfold(axis, size, size)
        grid = patches.shape[2:5]
        rows = patches.permute(0, 2, 3, 4, 1, 5, 6, 7).reshape(len(x), prod(grid), self.in_features)
        weight = self.effective_weight().reshape(self.out_features, self.in_features)
        return exact_linear(rows, weight, self.effective_bias()).transpose(1, 2).unflatten(2, grid)


class ExactPatchEmbedding(PatchProduct, nn.Conv3d):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self.product(input)


class ExactTextTimeEmbedding(stock.WanTimeTextImageEmbedding):
    """The sinusoid in fp32, all that follows in the dtype of the text; `wide`: the embedding of time in fp32 too."""

    wide: bool

    def forward(
        self,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        encoder_hidden_states_image: torch.Tensor | None = None,
        timestep_seq_len: int | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, None]:
        temb = self.embedded_time(timestep, encoder_hidden_states.dtype)
        return temb, self.time_proj(self.act_fn(temb)), self.text_embedder(encoder_hidden_states), None

    def embedded_time(self, timestep: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        sinusoid = self.timesteps_proj(timestep)
        if not self.wide:
            return self.time_embedder(sinusoid.to(dtype))
        first, last = self.time_embedder.linear_1, self.time_embedder.linear_2
        return _wide_linear(last, exact_silu(_wide_linear(first, sinusoid))).to(dtype)


def _wide_linear(layer: Any, x: torch.Tensor) -> torch.Tensor:
    bias = layer.effective_bias()
    return exact_linear(x, layer.effective_weight().float(), None if bias is None else bias.float())


def rope_tables(rope: nn.Module, latents: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines for latents of this grid, [1, S, 1, D/2]."""
    cos, sin = rope(latents)  # fp32, each number twice
    return cos[..., 0::2].to(dtype), sin[..., 1::2].to(dtype)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Neighbouring pairs of x, [B, S, H, D], by the tables."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).to(x.dtype)


def _attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    query, key, value = (part.permute(0, 2, 1, 3) for part in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask).permute(0, 2, 1, 3)


class ExactAttention(stock.WanAttnProcessor):
    """Self- and cross-attention, of all tokens: text is padded with zeros that are attended to.

    Args:
        exact: by `exact_attention`, or else by torch's own.
    """

    def __init__(self, exact: bool) -> None:
        super().__init__()
        self.exact = exact

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        text = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key = attn.norm_q(attn.to_q(hidden_states)), attn.norm_k(attn.to_k(text))
        query, key, value = (part.unflatten(2, (attn.heads, -1)) for part in (query, key, attn.to_v(text)))
        if rotary_emb is not None:
            query, key = rotate(query, *rotary_emb), rotate(key, *rotary_emb)
        attended = exact_attention(_attend, query, key, value, None) if self.exact else _attend(query, key, value, None)
        return attn.to_out[0](attended.flatten(2))


class WanTransformerBlock(stock.WanTransformerBlock):  # its name is what peft and compile know it by
    wide: bool

    def forward(
        self, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor, temb: torch.Tensor, rotary_emb: Any
    ) -> torch.Tensor:
        """[B, S, D] with text of [B, L, D], modulated by `temb`, [B, 6, D]; all in one dtype.

        `wide`: modulations, gates and residuals in fp32.
        """
        x, dtype = hidden_states, hidden_states.dtype
        work = torch.float32 if self.wide else dtype
        table = self.scale_shift_table.to(dtype).to(work) + temb.to(work)
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = table.chunk(6, dim=1)
        modulated = (self.norm1(x.to(work)) * (1 + scale) + shift).to(dtype)
        x = (x.to(work) + self.attn1(modulated, None, None, rotary_emb) * gate).to(dtype)
        x = x + self.attn2(self.norm2(x), encoder_hidden_states, None, None)
        modulated = (self.norm3(x.to(work)) * (1 + ffn_scale) + ffn_shift).to(dtype)
        return (x.to(work) + self.ffn(modulated) * ffn_gate).to(dtype)


def _run(block: nn.Module, *inputs: Any) -> torch.Tensor:
    return block(*inputs)


class WanTransformer3DModel(stock.WanTransformer3DModel):
    wide: bool

    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        encoder_hidden_states_image: torch.Tensor | None = None,
        return_dict: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[torch.Tensor]:
        """
        Args:
            hidden_states: [B, C, F', h, w], in what the model computes in, as the text is.
            timestep: [B] fp32, 0 to 1000.
            encoder_hidden_states: [B, L, D].

        Returns:
            [B, C', F', h, w].
        """
        assert not return_dict and encoder_hidden_states_image is None and timestep.ndim == 1
        rotary = rope_tables(self.rope, hidden_states, torch.float32 if self.wide else hidden_states.dtype)
        grid = self.patch_embedding(hidden_states)
        x = grid.flatten(2).transpose(1, 2).contiguous()
        temb, modulation, text, _ = self.condition_embedder(timestep, encoder_hidden_states)
        modulation = modulation.unflatten(1, (6, -1))
        checkpointing = torch.is_grad_enabled() and self.gradient_checkpointing
        run: Any = self._gradient_checkpointing_func if checkpointing else _run
        for block in self.blocks:
            x = run(block, x, text, modulation, rotary)
        return (self._unpatched(self.proj_out(self.modulated(x, temb)), grid.shape[2:]),)

    def modulated(self, x: torch.Tensor, temb: torch.Tensor) -> torch.Tensor:
        work = torch.float32 if self.wide else x.dtype
        table = self.scale_shift_table.to(x.dtype).to(work) + temb.to(work).unsqueeze(1)
        shift, scale = table.chunk(2, dim=1)
        return (self.norm_out(x.to(work)) * (1 + scale) + shift).to(x.dtype)

    def _unpatched(self, patches: torch.Tensor, grid: torch.Size) -> torch.Tensor:
        config: Any = self.config
        cells = patches.unflatten(2, (*config.patch_size, -1)).unflatten(1, grid)  # [B, F, H, W, f, h, w, C]
        return cells.permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(6, 7).flatten(4, 5).flatten(2, 3)


EXACT = {
    nn.RMSNorm: ExactRMSNorm,
    FP32LayerNorm: ExactLayerNorm,
    nn.Conv3d: ExactPatchEmbedding,
    stock.WanTimeTextImageEmbedding: ExactTextTimeEmbedding,
    stock.WanTransformerBlock: WanTransformerBlock,
    stock.WanTransformer3DModel: WanTransformer3DModel,
}


def install(transformer: nn.Module, dtype: torch.dtype, parity: str = "exact") -> None:
    """Lets diffusers' transformer compute in `dtype` what the engine's computes; `reference`: with diffusers' own roundings."""
    install_linears(transformer, dtype)
    install_activations(transformer)
    for module in transformer.modules():
        if type(module) in EXACT:
            module.__class__ = EXACT[type(module)]
        if isinstance(module, (ExactTextTimeEmbedding, WanTransformerBlock, WanTransformer3DModel)):
            module.wide = parity == "reference"
        if isinstance(module, ExactPatchEmbedding):
            module.compute_dtype = dtype
        if isinstance(module, stock.WanAttention):
            attention: Any = module
            attention.set_processor(ExactAttention(parity == "exact"))
