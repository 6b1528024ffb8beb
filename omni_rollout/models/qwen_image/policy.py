"""Qwen-Image on the trainer's side: diffusers' transformer, computing what the engine computes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial, wraps
from pathlib import Path
from typing import Any

import torch
from diffusers import QwenImageTransformer2DModel
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry, _native_attention
from diffusers.models.transformers import transformer_qwenimage

from omni_rollout.diffusion import exact_ops
from omni_rollout.diffusion.activations import install_activations
from omni_rollout.diffusion.attention import exact_attention
from omni_rollout.diffusion.machine import pin_switches
from omni_rollout.errors import PinnedKnobError
from omni_rollout.models.qwen_image.velocity import Conditioning
from omni_rollout.types import Trajectory

BLOCK_NORMS = ("img_norm1", "img_norm2", "txt_norm1", "txt_norm2")


def load_policy(path: str, dtype: torch.dtype, parity: str = "exact") -> QwenImageTransformer2DModel:
    """The checkpoint's transformer with fp32 master weights, computing in `dtype`.

    Rounds where the engine's transformer does (`exact`, `fast`) or where diffusers' own does (`reference`), and registers
    the RoPE and the attention that go with it in diffusers' tables of them, for this whole process.

    Raises:
        PinnedKnobError: diffusers is set to another attention backend than torch's.
    """
    check_attention()
    subfolder = {"subfolder": "transformer"} if not (Path(path) / "config.json").exists() else {}
    loaded: Any = QwenImageTransformer2DModel.from_pretrained(path, torch_dtype=torch.float32, **subfolder)
    transformer: QwenImageTransformer2DModel = loaded
    exact_ops.install_linears(transformer, dtype)
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


def network(transformer: torch.nn.Module, **inputs: Any) -> torch.Tensor:
    return transformer(**inputs, return_dict=False)[0]


def conditioning(trajectory: Trajectory, device: torch.device) -> Conditioning:
    def on_device(tensor: torch.Tensor | None) -> torch.Tensor | None:
        return None if tensor is None else tensor.to(device)

    return Conditioning(
        prompt_embeds=trajectory.prompt_embeds.to(device),
        prompt_embeds_mask=trajectory.prompt_embeds_mask.to(device),
        negative_prompt_embeds=on_device(trajectory.negative_prompt_embeds),
        negative_prompt_embeds_mask=on_device(trajectory.negative_prompt_embeds_mask),
        true_cfg_scale=trajectory.spec.true_cfg_scale,
        height=trajectory.spec.height,
        width=trajectory.spec.width,
    )


def batch_keys(trajectories: Sequence[Trajectory]) -> list[tuple[object, ...]]:
    """One key per trajectory; those with equal keys may share a forward pass."""
    cpu = torch.device("cpu")
    return [conditioning(trajectory, cpu).batch_key for trajectory in trajectories]
