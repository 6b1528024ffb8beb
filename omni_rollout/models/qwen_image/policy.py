"""Qwen-Image on the trainer's side: diffusers' transformer, computing what the engine computes."""

from __future__ import annotations

from functools import partial, wraps
from typing import Any

import torch
from diffusers import QwenImageTransformer2DModel
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry, _native_attention
from diffusers.models.transformers import transformer_qwenimage

from omni_rollout.diffusion import exact_ops
from omni_rollout.diffusion.activations import install_activations
from omni_rollout.diffusion.attention import exact_attention
from omni_rollout.diffusion.machine import pin_switches
from omni_rollout.errors import PinnedKnobError, UserError
from omni_rollout.models.base.network import Held, load_network
from omni_rollout.types import Trajectory

# What LoRA is added to, and the class of diffusers whose pipelines read what is saved.
LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
LORA_PIPELINE = "QwenImagePipeline"
BLOCK_NORMS = ("img_norm1", "img_norm2", "txt_norm1", "txt_norm2")


def load_policy(path: str, dtype: torch.dtype, parity: str = "exact", held: Held | None = None) -> QwenImageTransformer2DModel:
    """The checkpoint's transformer with its weights as they are there, computing in `dtype`.

    Rounds where the engine's transformer does (`exact`, `fast`) or where diffusers' own does (`reference`), and registers
    the RoPE and the attention that go with it in diffusers' tables of them, for this whole process.

    Args:
        held: see `load_network`.

    Raises:
        PinnedKnobError: diffusers is set to another attention backend than torch's.
        UserError: a transformer that was distilled for guidance, or not all of one.
        WeightSyncError: see `load_network`.
    """
    check_attention()
    transformer = load_network(QwenImageTransformer2DModel, path, held=held)
    if transformer.config.guidance_embeds:  # neither diffusers' forward nor the engine's can be called with it
        raise UserError(
            f"{path}: its transformer was distilled for guidance (guidance_embeds), which cannot be sampled; give another"
        )
    exact_ops.install_linears(transformer, dtype)
    exact_ops.install_embeddings(transformer, dtype)
    install_activations(transformer)
    rope: Any = transformer_qwenimage.ROPE_PER_DEVICE
    attention: Any = _AttentionBackendRegistry._backends
    attention[AttentionBackendName.NATIVE] = _exact_attention if parity == "exact" else _native_attention
    if parity == "reference":
        exact_ops.install_rms_norms(transformer, exact_ops.ReferenceRMSNorm)
        rope["cpu"] = rope["cuda"] = partial(transformer_qwenimage.apply_rotary_emb_qwen, use_real=False)
    else:
        exact_ops.install_rms_norms(transformer)
        exact_ops.install_layer_norms(
            layer for name, layer in transformer.named_modules() if name.rpartition(".")[2] in BLOCK_NORMS
        )
        rope["cpu"] = rope["cuda"] = exact_ops.exact_rope
    return transformer.eval()


def check_attention() -> None:
    pin_switches()
    backend: Any = _AttentionBackendRegistry.get_active_backend()[0]
    if backend != AttentionBackendName.NATIVE:
        raise PinnedKnobError(
            f"diffusers' attention backend is {backend.value}, the engine's is torch's: unset DIFFUSERS_ATTN_BACKEND (native)"
        )


@wraps(_native_attention)
def _exact_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: torch.Tensor | None = None, **others: Any
) -> torch.Tensor:
    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        return _native_attention(query, key, value, attn_mask=mask, **others)

    return exact_attention(attend, query, key, value, attn_mask)


def network(policy: torch.nn.Module, *, expert: int = 0, **inputs: Any) -> torch.Tensor:
    """The transformer, perhaps wrapped by a trainer engine, on what `velocity` gives it."""
    return policy(**inputs, return_dict=False)[0]


def misfit(policy: Any, trajectory: Trajectory) -> str | None:
    """Why the trajectory cannot be one of this transformer's; None: it may be."""
    expected = {"latents": policy.config.in_channels, "prompt_embeds": policy.config.joint_attention_dim}
    for name, size in expected.items():
        found = getattr(trajectory, name).shape[-1]
        if found != size:
            return f"{name} has {found} channels, the model has {size}"
    return None
