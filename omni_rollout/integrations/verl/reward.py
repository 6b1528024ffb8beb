"""The run's rewards inside verl's reward workers."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import ray
import torch
from verl import DataProto
from verl.experimental.reward_loop import RewardLoopManager
from verl.experimental.reward_loop.reward_loop import RewardLoopWorker
from verl.experimental.reward_loop.reward_manager.base import RewardManagerBase

from omni_rollout.integrations.verl import NAME
from omni_rollout.integrations.verl.records import RUNTIME_ENV, run_config
from omni_rollout.rewards import WeightedSum
from omni_rollout.types import Trajectory


class RewardManager(RewardManagerBase):
    def __init__(self, config: Any, tokenizer: Any, compute_score: Any, **_: Any) -> None:
        super().__init__(config, tokenizer, compute_score)
        reward = run_config(config[NAME]).reward
        self._rewards = WeightedSum(reward.weights, settings=reward)

    async def run_single(self, data: DataProto) -> dict[str, Any]:
        """`reward_score`: the weighted sum, NaN where the image could not be scored, for verl takes no None;
        `reward_extra_info`: each reward before its weight; `failures`: why it could not be scored."""
        row = data.non_tensor_batch
        batch = self._rewards([row["media"][0]], [row["prompt"][0]])
        return {
            "reward_score": math.nan if batch.total[0] is None else batch.total[0],
            "reward_extra_info": {name: values[0] for name, values in batch.breakdown.items()},
            "failures": batch.failures,
        }

    @classmethod
    def assemble_rm_scores(cls, data: DataProto, scores: list[float]) -> torch.Tensor:
        return torch.tensor(scores, dtype=torch.float64)[:, None]


class RewardWorkers(RewardLoopManager):
    """verl's reward workers, which Ray starts again when they die."""

    def _init_reward_loop_workers(self) -> None:
        # Ray gives up large arguments of a constructor after the first start, and could not start it again without them.
        self._kept = ray.put(self.config)
        worker: Any = ray.remote(runtime_env=RUNTIME_ENV, max_restarts=-1, scheduling_strategy="SPREAD")(RewardLoopWorker)
        self.reward_loop_workers = [
            worker.options(name=f"reward_loop_worker_{index}").remote(self._kept, self.reward_router_address)
            for index in range(self.config.reward.num_workers)
        ]


def to_score(trajectory: Trajectory) -> DataProto:
    """What `run_single` reads."""
    row: dict[str, np.ndarray] = {}
    for name, value in (("media", trajectory.media), ("prompt", trajectory.prompt)):
        row[name] = np.empty(1, dtype=object)  # np.array would look into the array
        row[name][0] = value
    return DataProto(non_tensor_batch=row)
