"""What Qwen-Image-Layered's transformer is told beside what Qwen-Image's is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from omni_rollout.models.base.velocity import Conditioning
from omni_rollout.models.qwen_image import velocity as parent
from omni_rollout.models.qwen_image.velocity import output, scales, timestep
from omni_rollout.types import SamplingSpec

__all__ = ["output", "scales", "timestep"]


def inputs(latents: torch.Tensor, rows: Sequence[Conditioning], dtype: torch.dtype) -> dict[str, Any]:
    """`additional_t_cond` is an index: 0 says that pictures have alpha. No published pipeline says anything else."""
    with_alpha = torch.zeros(len(rows), dtype=torch.long, device=latents.device)
    return {**parent.inputs(latents, rows, dtype), "additional_t_cond": with_alpha}


def renormalise(spec: SamplingSpec) -> bool:
    return spec.extra["cfg_normalize"]
