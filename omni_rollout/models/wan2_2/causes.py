"""The rules whose breaking costs Wan2.2 its equal bits, each broken on the trainer's side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.normalization import FP32LayerNorm
from diffusers.models.transformers import transformer_wan as stock
from torch import nn

from omni_rollout.models.base import velocity as base
from omni_rollout.models.base.causes import Cause, Setting, changed_text, swapped
from omni_rollout.models.base.velocity import Conditioning
from omni_rollout.models.wan2_2 import operators, velocity
from omni_rollout.types import SamplingSpec


def timestep_as(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Setting], AbstractContextManager[None]]:
    return lambda _: swapped(velocity, "timestep", lambda timesteps, dtype: change(timesteps))


def shifted_boundary(steps: int) -> Callable[[Setting], AbstractContextManager[None]]:
    def expert_at(spec: SamplingSpec, step: int) -> int:
        return int(step >= spec.extra["boundary_step"] + steps)

    return lambda _: swapped(base, "expert_at", expert_at)


def one_scale(_: Setting) -> AbstractContextManager[None]:
    def scales(rows: Sequence[Conditioning], expert: int) -> list[float]:
        return [row.spec.true_cfg_scale for row in rows]

    return swapped(velocity, "scales", scales)


def fp32_rope(_: Setting) -> AbstractContextManager[None]:
    original = operators.rope_tables

    def tables(rope: nn.Module, latents: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        return original(rope, latents, torch.float32)

    return swapped(operators, "rope_tables", tables)


def fp32_modulation(_: Setting) -> AbstractContextManager[None]:
    return swapped(operators.WanTransformerBlock, "forward", stock.WanTransformerBlock.forward)


def fp32_last_modulation(_: Setting) -> AbstractContextManager[None]:
    def modulated(self: Any, x: torch.Tensor, temb: torch.Tensor) -> torch.Tensor:
        shift, scale = (self.scale_shift_table + temb.unsqueeze(1)).chunk(2, dim=1)
        return (self.norm_out(x.float()) * (1 + scale) + shift).to(x.dtype)

    return swapped(operators.WanTransformer3DModel, "modulated", modulated)


def fp32_time(_: Setting) -> AbstractContextManager[None]:
    def embedded(self: Any, timestep: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        first, last = self.time_embedder.linear_1, self.time_embedder.linear_2
        inner = F.silu(F.linear(self.timesteps_proj(timestep), first.weight, first.bias))
        return F.linear(inner, last.weight, last.bias).to(dtype)

    return swapped(operators.ExactTextTimeEmbedding, "embedded_time", embedded)


def stock_layer_norm(_: Setting) -> AbstractContextManager[None]:
    return swapped(operators.ExactLayerNorm, "forward", FP32LayerNorm.forward)


def convolution(_: Setting) -> AbstractContextManager[None]:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return F.conv3d(x, self.effective_weight(), self.effective_bias(), stride=self.stride)

    return swapped(operators.ExactPatchEmbedding, "forward", forward)


def trimmed(inputs: dict[str, Any]) -> None:
    text = inputs["encoder_hidden_states"]
    words = text.abs().amax(dim=(0, 2)).nonzero()
    inputs["encoder_hidden_states"] = text[:, : int(words.max()) + 1]


SPEC, VELOCITY = "omni_rollout/models/wan2_2/spec.py", "omni_rollout/models/wan2_2/velocity.py"
OPS = "omni_rollout/models/wan2_2/operators.py"
CAUSES: tuple[Cause | str, ...] = (
    Cause(
        name="timestep_int64",
        breaks="timestep truncated to int64, as the stock scheduler has it",
        settled_by=VELOCITY,
        broken=timestep_as(torch.Tensor.long),
    ),
    Cause(
        name="timestep_bfloat16",
        breaks="timestep rounded to bfloat16 before its sinusoid",
        settled_by=VELOCITY,
        broken=timestep_as(torch.Tensor.bfloat16),
    ),
    Cause(
        name="boundary_late",
        breaks="the first expert computes one step more",
        settled_by=SPEC,
        broken=shifted_boundary(1),
    ),
    Cause(
        name="boundary_early",
        breaks="the second expert computes one step more",
        settled_by=SPEC,
        broken=shifted_boundary(-1),
    ),
    Cause(
        name="one_scale",
        breaks="the second expert guided with the scale of the first",
        settled_by=VELOCITY,
        broken=one_scale,
    ),
    "latent_storage",
    Cause(name="rope", breaks="diffusers' RoPE: tables in fp32", settled_by=OPS, broken=fp32_rope),
    Cause(name="modulation", breaks="modulation, gates and residuals in fp32", settled_by=OPS, broken=fp32_modulation),
    Cause(name="last_modulation", breaks="the last modulation in fp32", settled_by=OPS, broken=fp32_last_modulation),
    Cause(name="time_embedding", breaks="time embedding in fp32", settled_by=OPS, broken=fp32_time),
    Cause(name="layer_norm", breaks="LayerNorm's weights not rounded", settled_by=OPS, broken=stock_layer_norm),
    Cause(name="patch_embedding", breaks="patches embedded by a convolution", settled_by=OPS, broken=convolution),
    Cause(
        name="width_trimmed",
        breaks="zeros after the text cut off, which the transformer attends to",
        settled_by="omni_rollout/models/wan2_2/rollout.py",
        broken=lambda setting: changed_text(setting, trimmed),
    ),
    "constant_shape",
    "log_prob_reduction",
    "attention_backend",
    "guidance_dtype",
    "compile",
    "lora_application",
)
