"""Advantage weighted matching, AWM (arXiv 2509.25050), as its code has it: a policy gradient on the flow matching loss.

    l = mean((v - (noise - x0))^2),   log_prob = -((l + 1e-10)^p - (1e-10)^p) t / p,   p = ghuber_power
    L = mean( -min(q A', clip(q, 1 +- clip_range) A') ) + kl_coef mean((v - v_ref)^2) + old_coef mean((v - v_old)^2)
    q = exp(log_prob - that of the policy before this step's first update),   A' = A / advantage_clip

The old policy is an average: old <- d old + (1 - d) policy after each step, d = min(0.3, 0.001 k), k the optimizer's steps so
far. In the published code its term is there only where kl_coef is above 0; here it stands by itself. kl_coef is 1e-3 (GenEval),
3e-3 (OCR) and 1e-4 (PickScore) there, clip_range 1: practically none. Flow-Factory cuts A at 1 and does not divide.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, ClassVar

from omni_rollout.algorithms.base import Forward, Samples, clipped_surrogate, element_means, outside
from omni_rollout.config import TrainConfig

if TYPE_CHECKING:
    import torch

TINY = 1e-10


@dataclass
class AWM(Forward):
    recalls: ClassVar[bool] = True
    keeps_old: ClassVar[bool] = True
    kl_coef: float = 3e-3
    old_coef: float = 1.0
    ghuber_power: float = 0.25
    times: int = 6  # of each image, one in each of as many equal parts of the schedule's first `time_share`
    time_share: float = 0.9
    first_time: bool = False  # whether the noisiest time is among them (published for PickScore)

    def sample_loss(self, samples: Samples) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        assert samples.first_velocity is not None and samples.old_velocity is not None
        ratio = (self._log_prob(samples, samples.velocity) - self._log_prob(samples, samples.first_velocity)).exp()
        values = clipped_surrogate(ratio, samples.advantages / self.advantage_clip, samples.clip_range)
        distance = element_means((samples.velocity - samples.old_velocity) ** 2)
        metrics = {"awm_clipfrac": outside(ratio, samples.clip_range), "old_distance": distance.detach()}
        return values + self.old_coef * distance, metrics

    def _log_prob(self, samples: Samples, velocity: torch.Tensor) -> torch.Tensor:
        power = self.ghuber_power
        error = element_means((velocity - samples.target) ** 2)
        return -((error + TINY) ** power - TINY**power) * samples.sigma / power

    def steps(self, count: int, draw: Random) -> list[int]:
        first = 0 if self.first_time else 1
        last = max(first + 1, int(count * self.time_share))
        number = min(self.times, last - first)
        edges = [first + (last - first) * part // number for part in range(number + 1)]
        return [draw.randrange(edges[part], edges[part + 1]) for part in range(number)]

    def old_decay(self, updates: int) -> float:
        return min(0.3, 0.001 * updates)

    def problems(self, config: TrainConfig) -> Iterator[str]:
        yield from super().problems(config)
        if self.times < 1:
            yield f"algorithm.times={self.times}: expected at least 1"
        if not 0 < self.time_share <= 1:
            yield f"algorithm.time_share={self.time_share}: expected more than 0, and at most 1"
        if not self.ghuber_power > 0:
            yield f"algorithm.ghuber_power={self.ghuber_power}: expected more than 0"
        if not self.old_coef >= 0:
            yield f"algorithm.old_coef={self.old_coef}: expected 0 or more"
