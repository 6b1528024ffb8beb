"""DanceGRPO (arXiv 2505.07818): Flow-GRPO's loss on a random share of the steps of each trajectory.

The step is `sampling.sde_type=dance_sde` with constant noise eta (`sampling.noise_level`, 0.3): Flow-GRPO's, with s = eta. Each
trajectory draws its own steps from the run's seed. The published code has no KL term, and its model's time is int(1000 sigma);
here it is 1000 sigma, as the rollout has it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

from omni_rollout.algorithms.base import random_times
from omni_rollout.algorithms.flow_grpo import FlowGRPO
from omni_rollout.config import SDETypeName, TrainConfig


@dataclass
class DanceGRPO(FlowGRPO):
    advantage_std: str = "group"
    advantage_deviation: str = "sample"
    advantage_eps: float = 1e-8
    timestep_fraction: float = 0.6  # share of a trajectory's stochastic steps that is learned from, at least one

    def steps(self, count: int, draw: Random) -> list[int]:
        return random_times(count, max(1, int(count * self.timestep_fraction)), draw)

    def problems(self, config: TrainConfig) -> Iterator[str]:
        yield from super().problems(config)
        if not 0 < self.timestep_fraction <= 1:
            yield f"algorithm.timestep_fraction={self.timestep_fraction}: expected more than 0, and at most 1"
        if config.sampling.sde_type is not SDETypeName.dance_sde:
            yield (
                f"sampling.sde_type={config.sampling.sde_type.value}: dance_grpo learns from steps of constant noise; "
                "give sampling.sde_type=dance_sde"
            )
