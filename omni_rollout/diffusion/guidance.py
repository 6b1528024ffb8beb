"""True classifier-free guidance, once for both sides."""

from __future__ import annotations

import torch

from omni_rollout.diffusion.sde import per_sample


def guide(
    velocity: torch.Tensor, negative_velocity: torch.Tensor, true_cfg_scale: torch.Tensor | float, *, renormalise: bool = True
) -> torch.Tensor:
    """Moves away from the negative prompt.

    Args:
        velocity, negative_velocity: [B, ...] any float dtype; combined in fp32.
        true_cfg_scale: one number, or [B].
        renormalise: as Qwen-Image does, restore each token's norm (over the last axis) to that of the positive branch.

    Returns:
        [B, ...] fp32. A token whose combination is exactly zero stays zero.
    """
    positive, negative = velocity.float(), negative_velocity.float()
    scale = torch.as_tensor(true_cfg_scale, dtype=torch.float32, device=positive.device)
    combined = negative + per_sample(scale, positive) * (positive - negative)
    if not renormalise:
        return combined
    norm = combined.norm(dim=-1, keepdim=True)
    rescale = positive.norm(dim=-1, keepdim=True) / torch.where(norm > 0, norm, torch.ones_like(norm))
    return combined * rescale
