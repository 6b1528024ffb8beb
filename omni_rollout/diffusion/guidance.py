"""True classifier-free guidance, as Qwen-Image applies it, once for both sides."""

from __future__ import annotations

import torch


def guide(velocity: torch.Tensor, negative_velocity: torch.Tensor, true_cfg_scale: torch.Tensor | float) -> torch.Tensor:
    """Moves away from the negative prompt, then restores each token's norm to that of the positive branch.

    Args:
        velocity, negative_velocity: [B, S, C] any float dtype; combined in fp32.
        true_cfg_scale: one number, or [B].

    Returns:
        [B, S, C] fp32. A token whose combination is exactly zero stays zero.
    """
    positive, negative = velocity.float(), negative_velocity.float()
    scale = torch.as_tensor(true_cfg_scale, dtype=torch.float32, device=positive.device)
    combined = negative + scale.reshape(-1, 1, 1) * (positive - negative)
    norm = combined.norm(dim=-1, keepdim=True)
    rescale = positive.norm(dim=-1, keepdim=True) / torch.where(norm > 0, norm, torch.ones_like(norm))
    return combined * rescale
