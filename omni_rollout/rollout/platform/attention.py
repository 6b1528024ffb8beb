"""torch's scaled dot-product attention: for the CPU, which the engine's own class refuses, and exact on both."""

from __future__ import annotations

from dataclasses import replace

import torch
from vllm_omni.diffusion.attention.backends.abstract import AttentionMetadata
from vllm_omni.diffusion.attention.backends.sdpa import SDPABackend, SDPAImpl
from vllm_omni.diffusion.attention.layer import Attention

from omni_rollout.diffusion.attention import exact_attention


class CpuSDPAImpl(SDPAImpl):
    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_metadata: AttentionMetadata | None = None,
    ) -> torch.Tensor:
        return self._forward_impl(query, key, value, attn_metadata, mask_mode="broadcast_k")


class CpuSDPABackend(SDPABackend):
    @staticmethod
    def get_impl_cls() -> type[SDPAImpl]:
        return CpuSDPAImpl


class ExactSDPAImpl(SDPAImpl):
    """In calls that do not depend on the batch. As it is: on a GPU."""

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_metadata: AttentionMetadata | None = None,
    ) -> torch.Tensor:
        own = super().forward

        def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
            return own(query, key, value, None if attn_metadata is None else replace(attn_metadata, attn_mask=mask))

        mask = None if attn_metadata is None else attn_metadata.attn_mask
        kept = mask if mask is None or mask.is_floating_point() else mask.bool()
        return exact_attention(attend, query, key, value, kept)


class ExactCpuSDPAImpl(ExactSDPAImpl, CpuSDPAImpl):
    """On a CPU."""


EXACT = {SDPAImpl: ExactSDPAImpl, CpuSDPAImpl: ExactCpuSDPAImpl}


def install_attention(module: torch.nn.Module) -> None:
    """Gives every attention layer below `module` exact calls. fp32 takes the fallback."""
    for layer in module.modules():
        if isinstance(layer, Attention):
            for implementation in (layer.attention, layer.sdpa_fallback):
                implementation.__class__ = EXACT.get(type(implementation), type(implementation))
