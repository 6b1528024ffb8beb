"""What Qwen-Image's transformer is told, and what of its answer is the velocity."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from omni_rollout.diffusion.schedule import model_timestep
from omni_rollout.models import family_module
from omni_rollout.models.base.velocity import Conditioning
from omni_rollout.types import SamplingSpec


def inputs(latents: torch.Tensor, rows: Sequence[Conditioning], dtype: torch.dtype) -> dict[str, Any]:
    """Beside text and time. `latents`: [B, S, C] fp32; latents of input images come after them, on the same axis."""
    spec = rows[0].spec
    grid = family_module(spec.family, "spec").layout(spec).grid  # of the family, which may have this one for a parent
    hidden_states = latents.to(dtype)
    if rows[0].conditions:
        beside = torch.stack([row.conditions["image_latents"] for row in rows])
        hidden_states = torch.cat([hidden_states, beside.to(dtype)], dim=1)
    return {"hidden_states": hidden_states, "img_shapes": [list(grid)] * len(rows)}


def timestep(timesteps: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return model_timestep(timesteps, dtype)


def output(prediction: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
    """The part of [B, S', C] that belongs to the target, [B, S, C]."""
    return prediction[:, : latents.shape[1]]


def scales(rows: Sequence[Conditioning], expert: int) -> list[float]:
    return [row.spec.true_cfg_scale for row in rows]


def renormalise(spec: SamplingSpec) -> bool:
    return True
