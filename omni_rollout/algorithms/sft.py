"""Supervised fine-tuning, by flow matching: on the best image of each group (rejection sampling), or on a data set's images.

    L = mean((v - (noise - x0))^2) + kl_coef mean((v - v_ref)^2)          flow matching: arXiv 2210.02747

A group of equal rewards has no best image and is left out. With `columns=[image]` every row of `prompts` is learned from.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, ClassVar

from omni_rollout.algorithms.base import FromData, Samples, element_means, random_times
from omni_rollout.config import TrainConfig

if TYPE_CHECKING:
    import torch


@dataclass
class SFT(FromData):
    images_a_row: ClassVar[tuple[str, ...]] = ("image",)
    best: int = 1  # images of each group that are learned from
    times: int = 4  # of each image, drawn from the schedule's

    def units(self, advantages: Sequence[float], group_ids: Sequence[str]) -> list[tuple[int, ...]]:
        """The best of each group, above its mean; of a data set's, all."""
        if self.targets:
            return super().units(advantages, group_ids)
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
        if self.targets and self.best != 1:
            yield f"algorithm.best={self.best}: of no use with algorithm.columns, where every row is learned from; leave it out"
