"""DiffusionNFT (arXiv 2509.16117), as its code has it: towards good images and away from bad ones, without log-probs.

    r = clip(A / (2 c) + 1/2, 0, 1),  c = advantage_clip          x_t = (1 - t) x0 + t noise
    v+ = b v + (1 - b) v_old,   v- = (1 + b) v_old - b v,   b = mix_beta;   x+- = x_t - t v+-
    w+- = max(mean|x+- - x0|, 1e-5), without gradient
    L = c mean( [ r mean((x+ - x0)^2 / w+) + (1 - r) mean((x- - x0)^2 / w-) ] / b ) + kl_coef mean((v - v_ref)^2)

The paper's loss is on velocities, with weights r and 1 - r alone. Images are sampled by the old policy, deterministically,
without guidance. It follows the policy after each step: old <- d old + (1 - d) policy, with k the optimizer's steps so far and
d of old_decay_type 0: 0;  1: min(0.001 k, 0.5);  2: 0 up to k = 75, then min(0.0075 (k - 75), 0.999).
Published for OCR: mix_beta 0.1, type 2.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, ClassVar

from omni_rollout.algorithms.base import Forward, Samples, element_means, per_row
from omni_rollout.config import TrainConfig

if TYPE_CHECKING:
    import torch


@dataclass
class DiffusionNFT(Forward):
    keeps_old: ClassVar[bool] = True
    samples_with_old: ClassVar[bool] = True
    kl_coef: float = 1e-4
    mix_beta: float = 1.0
    timestep_fraction: float = 0.99  # of the schedule's times, from the noisiest on, each learned from once
    old_decay_type: int = 1

    def sample_loss(self, samples: Samples) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        assert samples.old_velocity is not None
        clip, beta = self.advantage_clip, self.mix_beta
        goodness = (samples.advantages / (2 * clip) + 0.5).clamp(0, 1)
        towards = beta * samples.velocity + (1 - beta) * samples.old_velocity
        away = (1 + beta) * samples.old_velocity - beta * samples.velocity
        good, bad = (self._distance(samples, velocity) for velocity in (towards, away))
        moved = element_means((samples.velocity.detach() - samples.old_velocity) ** 2)
        return clip * (goodness * good + (1 - goodness) * bad) / beta, {"old_distance": moved}

    def _distance(self, samples: Samples, velocity: torch.Tensor) -> torch.Tensor:
        """[B]: of the x0 that a velocity leads to from the image's own, over its mean absolute value."""
        gap = samples.sample - per_row(samples.sigma, velocity) * velocity - samples.x0
        weight = element_means(gap.detach().abs()).clamp(min=1e-5)
        return element_means(gap**2) / weight

    def steps(self, count: int, draw: Random) -> list[int]:
        return list(range(max(1, int(count * self.timestep_fraction))))

    def old_decay(self, updates: int) -> float:
        return [0.0, min(0.001 * updates, 0.5), min(0.0075 * max(updates - 75, 0), 0.999)][self.old_decay_type]

    def problems(self, config: TrainConfig) -> Iterator[str]:
        yield from super().problems(config)
        if not self.mix_beta > 0:
            yield f"algorithm.mix_beta={self.mix_beta}: expected more than 0"
        if not 0 < self.timestep_fraction <= 1:
            yield f"algorithm.timestep_fraction={self.timestep_fraction}: expected more than 0, and at most 1"
        if self.old_decay_type not in (0, 1, 2):
            yield f"algorithm.old_decay_type={self.old_decay_type}: expected 0, 1 or 2"
