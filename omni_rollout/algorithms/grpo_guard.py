"""GRPO-Guard (arXiv 2510.22319): a ratio whose logarithm has mean zero at every step, and gradients of equal size.

    p = exp( s [ log_prob - old_log_prob + mean((mu - mu_old)^2) / (2 s^2) ] ) = exp( mean( z (mu - mu_old) ) )
    L = mean( -min(p A, clip(p, 1 +- clip_range) A) / |dt| )

s is the whole step's deviation, sqrt(|dt|) in it, and z = (x' - mu_old) / s the noise that the rollout drew. The published code
computes the first form, a difference of two large numbers; here it is the second, equal on paper. Published clip ranges are
2e-6 (OCR) and 4e-6 (PickScore and HPS), for Flow-SDE alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from omni_rollout.algorithms.base import Coupled, Steps, clipped_surrogate, element_means, outside, per_row
from omni_rollout.config import SDETypeName, TrainConfig

if TYPE_CHECKING:
    import torch


@dataclass
class GRPOGuard(Coupled):
    recalls: ClassVar[bool] = True
    advantage_std: str = "group"

    def policy_loss(self, steps: Steps) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        assert steps.old_mean is not None
        noise = (steps.prev_sample - steps.old_mean) / per_row(steps.step_std, steps.mean)
        ratio = element_means(noise * (steps.mean - steps.old_mean)).exp()
        values = clipped_surrogate(ratio, steps.advantages, steps.clip_range) / (steps.sigma - steps.sigma_next)
        return values, {"guard_ratio_mean": ratio.detach(), "guard_clipfrac": outside(ratio, steps.clip_range)}

    def problems(self, config: TrainConfig) -> Iterator[str]:
        yield from super().problems(config)
        if config.sampling.sde_type is not SDETypeName.sde:
            yield f"sampling.sde_type={config.sampling.sde_type.value}: grpo_guard is made for sampling.sde_type=sde; give that"
