"""What Wan2.2's transformers are told; their answer is the velocity."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from omni_rollout.models.base.velocity import Conditioning
from omni_rollout.types import SamplingSpec


def inputs(latents: torch.Tensor, rows: Sequence[Conditioning], dtype: torch.dtype) -> dict[str, Any]:
    """Beside text and time. `latents`: [B, C, F', h, w] fp32; what is given with them stands beside them, as channels."""
    beside = [torch.stack([row.conditions[name] for row in rows]) for name in sorted(rows[0].conditions)]
    return {"hidden_states": torch.cat([latents, *beside], dim=1).to(dtype)}


def timestep(timesteps: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Unscaled and in fp32: the sinusoid of 0 to 1000, not the number, is rounded to `dtype`, in the transformer."""
    return timesteps.float()


def output(prediction: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
    return prediction


def scales(rows: Sequence[Conditioning], expert: int) -> list[float]:
    return [row.spec.extra["true_cfg_scale_2"] if expert else row.spec.true_cfg_scale for row in rows]


def renormalise(spec: SamplingSpec) -> bool:
    return False
