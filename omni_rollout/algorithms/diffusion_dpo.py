"""Diffusion-DPO (arXiv 2311.12908). Online, of each group the best image is preferred to the worst; of a data set, the first.

    e = mean((v - (noise - x0))^2), at the same time and with the same noise for winner w and loser l
    L = mean( -log sigmoid( -(dpo_beta / 2) [ (e_w - e_w,ref) - (e_l - e_l,ref) ] ) )

The reference is the policy the run started from. The paper's T omega(lambda_t) is within dpo_beta: 5000 in its code, for
noise prediction; 2000 for flows in verl-omni and Flow-Factory; 100 in verl-omni's online recipe, which this follows. With
`columns=[chosen,rejected]` the pairs are those of `prompts`, whoever made them, as in the paper.
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
class DiffusionDPO(FromData):
    images_a_row: ClassVar[tuple[str, ...]] = ("chosen", "rejected")
    shares_noise: ClassVar[bool] = True
    rows_together: ClassVar[int] = 2
    dpo_beta: float = 100.0
    times: int = 1  # of each pair, drawn from the schedule's

    @property
    def needs_reference(self) -> bool:
        return True

    def units(self, advantages: Sequence[float], group_ids: Sequence[str]) -> list[tuple[int, ...]]:
        """(best, worst) of each group; none of a group of equal rewards."""
        pairs = []
        for group in dict.fromkeys(group_ids):
            members = [row for row, other in enumerate(group_ids) if other == group]
            best, worst = (choose(members, key=lambda row: advantages[row]) for choose in (max, min))
            pairs += [(best, worst)] if advantages[best] > advantages[worst] else []
        return pairs

    def sample_loss(self, samples: Samples) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """[pairs]."""
        assert samples.reference_velocity is not None
        own, reference = (
            element_means((velocity - samples.target) ** 2) for velocity in (samples.velocity, samples.reference_velocity)
        )
        gain = (own - reference).reshape(-1, 2)  # rows are winner, loser, winner, loser ...
        margin = -self.dpo_beta / 2 * (gain[:, 0] - gain[:, 1])
        values = (-margin).logaddexp(margin.new_zeros(()))  # -log sigmoid, without overflow
        return values, {"dpo_margin": margin.detach(), "dpo_accuracy": (margin.detach() > 0).float()}

    def steps(self, count: int, draw: Random) -> list[int]:
        return random_times(count, self.times, draw)

    def problems(self, config: TrainConfig) -> Iterator[str]:
        yield from super().problems(config)
        if not self.dpo_beta > 0:
            yield f"algorithm.dpo_beta={self.dpo_beta}: expected more than 0"
        if self.times < 1:
            yield f"algorithm.times={self.times}: expected at least 1"
        if config.trainer.micro_batch_size < 2:
            yield f"trainer.micro_batch_size={config.trainer.micro_batch_size}: diffusion_dpo scores pairs; give 2 or more"
