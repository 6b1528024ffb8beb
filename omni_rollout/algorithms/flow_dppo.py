"""Flow-DPPO (arXiv 2606.11025): no clipping of ratios; a step is left out when it has moved too far, and its way.

    D = mean((mu - mu_old)^2) / (2 s^2)
    L = mean( -keep p A ),   keep = not (D >= divergence_limit and (p > 1 if A > 0 else p < 1))

UniRL and verl-omni take 1e-5 for the limit, Flow-Factory 1e-6; verl-omni does not cut the advantages, which here is
`algorithm.advantage_clip=1e9`. `trainer.clip_range` is not read.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from omni_rollout.algorithms.base import Coupled, Steps, element_means, per_row
from omni_rollout.config import TrainConfig

if TYPE_CHECKING:
    import torch


@dataclass
class FlowDPPO(Coupled):
    recalls: ClassVar[bool] = True
    divergence_limit: float = 1e-5  # per element

    def policy_loss(self, steps: Steps) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        assert steps.old_mean is not None
        scaled = (steps.mean.detach() - steps.old_mean) / per_row(steps.step_std, steps.mean)
        divergence = element_means(scaled**2) / 2
        ratio = (steps.log_probs - steps.old_log_probs).exp()
        away = (ratio.detach() - 1) * steps.advantages > 0
        dropped = ((divergence >= self.divergence_limit) & away).float()
        return -(1 - dropped) * ratio * steps.advantages, {"divergence": divergence, "dropped": dropped}

    def problems(self, config: TrainConfig) -> Iterator[str]:
        yield from super().problems(config)
        if not self.divergence_limit > 0:
            yield f"algorithm.divergence_limit={self.divergence_limit}: expected more than 0"
