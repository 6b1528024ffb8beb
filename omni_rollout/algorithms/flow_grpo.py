"""Flow-GRPO (arXiv 2505.05470): group-relative advantages, and PPO's clipped objective on every denoising step.

Means are taken in fp64 and rounded once, so that they do not depend on the order of the elements.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

STD_EPS = 1e-4  # added to the standard deviation, as in the published code


@dataclass(frozen=True, kw_only=True)
class FlowGRPOLoss:
    """The loss, and the terms that metrics are made of (detached)."""

    loss: torch.Tensor  # [], to differentiate: policy_loss + kl_coef * kl
    policy_loss: torch.Tensor  # []
    kl: torch.Tensor  # [], mean of the given KL; 0 without one
    ratio: torch.Tensor  # [B] fp32, new over old probability density
    clipped_higher: torch.Tensor  # [B] bool, ratio above 1 + clip_range, whatever the advantage
    clipped_lower: torch.Tensor  # [B] bool, ratio below 1 - clip_range, whatever the advantage


def advantages(
    rewards: torch.Tensor, group_ids: Sequence[str], *, std: Literal["global", "group"], clip: float
) -> torch.Tensor:
    """[B] fp32: (reward - group mean) / (standard deviation + 1e-4), cut to [-clip, clip].

    A group of one, or of equal rewards, gets exact zeros: it says nothing about which image was better.

    Args:
        rewards: [B], any float dtype.
        group_ids: B; equal ones are compared, in whatever order they come.
        std: `global`, over all B rewards; `group`, over each group's own. Of the population (divided by the count).

    Raises:
        ValueError: a reward that is not finite, lengths that differ, an unknown `std`, or a clip that is not positive.
    """
    if std not in ("global", "group"):
        raise ValueError(f"algorithm.advantage_std={std}: expected global or group")
    if clip <= 0:
        raise ValueError(f"algorithm.advantage_clip={clip}: expected a positive number")
    if rewards.shape != (len(group_ids),):
        raise ValueError(f"{list(rewards.shape)} rewards for {len(group_ids)} group ids: expected one reward for each")
    values = rewards.double()
    if not bool(values.isfinite().all()):
        bad = sorted({group for group, ok in zip(group_ids, values.isfinite().tolist(), strict=True) if not ok})
        raise ValueError(f"rewards of group {', '.join(bad)} are not finite: they would make every advantage NaN")
    result = torch.zeros_like(values)
    for group in dict.fromkeys(group_ids):
        members = torch.tensor([index for index, other in enumerate(group_ids) if other == group], device=values.device)
        own = values[members]
        if bool((own == own[0]).all()):
            continue
        spread = (values if std == "global" else own).std(correction=0)
        result[members] = (own - own.mean()) / (spread + STD_EPS)
    return result.clamp(-clip, clip).float()


def loss(
    log_probs: torch.Tensor,
    old_log_probs: torch.Tensor,
    advantages: torch.Tensor,
    clip_range: float,
    *,
    kl: torch.Tensor | None = None,
    kl_coef: float = 0.0,
) -> FlowGRPOLoss:
    """Mean over B of -min(ratio * A, clip(ratio, 1 - clip_range, 1 + clip_range) * A), plus kl_coef times the mean KL.

    Args:
        log_probs: [B] fp32, of the policy, with gradients: one per (trajectory, step) pair.
        old_log_probs, advantages: [B] fp32.
        kl: [B] fp32, of each pair's step to the reference's (`sde.gaussian_kl`).
    """
    ratio = torch.exp(log_probs - old_log_probs)
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    policy_loss = -torch.minimum(ratio * advantages, clipped * advantages).double().mean().float()
    kl_mean = policy_loss.new_zeros(()) if kl is None else kl.double().mean().float()
    return FlowGRPOLoss(
        loss=policy_loss if kl is None else policy_loss + kl_coef * kl_mean,
        policy_loss=policy_loss.detach(),
        kl=kl_mean.detach(),
        ratio=ratio.detach(),
        clipped_higher=ratio.detach() > 1 + clip_range,
        clipped_lower=ratio.detach() < 1 - clip_range,
    )
