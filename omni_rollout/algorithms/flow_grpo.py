"""Flow-GRPO (arXiv 2505.05470): group-relative advantages, and PPO's clipped objective on every denoising step.

    L = mean( -min(p A, clip(p, 1 +- clip_range) A) ) + kl_coef mean(KL),   p = exp(log_prob - old_log_prob)

Log-probs are means over a latent's elements, so clip_range is per element. The paper's KL is the exact one, `kl_with_dt=true`;
its code leaves |dt| out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from omni_rollout.algorithms.base import Coupled, Steps, clipped_surrogate

if TYPE_CHECKING:
    import torch


@dataclass
class FlowGRPO(Coupled):
    def policy_loss(self, steps: Steps) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        ratio = (steps.log_probs - steps.old_log_probs).exp()
        return clipped_surrogate(ratio, steps.advantages, steps.clip_range), {}
