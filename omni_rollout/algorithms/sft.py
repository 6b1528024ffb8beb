"""Supervised fine-tuning on the best image of each group (rejection sampling): the plain baseline, by flow matching.

    L = mean((v - (noise - x0))^2) + kl_coef mean((v - v_ref)^2)          flow matching: arXiv 2210.02747

A group of equal rewards has no best image and is left out. Images of a data set are not read.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING

from omni_rollout.algorithms.base import Forward, Samples, element_means, random_times
from omni_rollout.config import TrainConfig

if TYPE_CHECKING:
    import torch


@dataclass
class SFT(Forward):
    best: int = 1  # images of each group that are learned from
    times: int = 4  # of each image, drawn from the schedule's

    def units(self, advantages: Sequence[float], group_ids: Sequence[str]) -> list[tuple[int, ...]]:
        """The best of each group, above its mean."""
        chosen = []
        for group in dict.fromkeys(group_ids):
            members = [row for row, other in enumerate(group_ids) if other == group and advantages[row] > 0]
            chosen += sorted(members, key=lambda row: -advantages[row])[: self.best]
        return [(row,) for row in chosen]

    def sample_loss(self, samples: Samples) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return element_means((samples.velocity - samples.target) ** 2), {}

    def steps(self, count: int, draw: Random) -> list[int]:
        return random_times(count, self.times, draw)

    def problems(self, config: TrainConfig) -> Iterator[str]:
        yield from super().problems(config)
        for key in ("best", "times"):
            if getattr(self, key) < 1:
                yield f"algorithm.{key}={getattr(self, key)}: expected at least 1"
