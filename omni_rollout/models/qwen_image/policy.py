"""Qwen-Image on the trainer's side: diffusers' transformer, computing what the engine computes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import QwenImageTransformer2DModel
from diffusers.models.transformers import transformer_qwenimage

from omni_rollout import exact_ops
from omni_rollout.models.qwen_image.velocity import Conditioning
from omni_rollout.types import Trajectory


def load_policy(path: str, dtype: torch.dtype) -> QwenImageTransformer2DModel:
    """The checkpoint's transformer with fp32 master weights, computing in `dtype` with the engine's roundings.

    Registers the engine's RoPE for this process's device in diffusers' table of RoPE functions.
    """
    subfolder = {"subfolder": "transformer"} if not (Path(path) / "config.json").exists() else {}
    loaded: Any = QwenImageTransformer2DModel.from_pretrained(path, torch_dtype=torch.float32, **subfolder)
    transformer: QwenImageTransformer2DModel = loaded
    exact_ops.install_linears(transformer, dtype)
    exact_ops.install_rms_norms(transformer)
    for block in transformer.transformer_blocks:
        exact_ops.install_layer_norms(iter((block.img_norm1, block.img_norm2, block.txt_norm1, block.txt_norm2)))
    rope: Any = transformer_qwenimage.ROPE_PER_DEVICE
    rope["cpu"] = exact_ops.exact_rope
    if torch.cuda.is_available():
        rope["cuda"] = exact_ops.exact_rope
    return transformer.eval()


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
