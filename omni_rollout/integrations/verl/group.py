"""The trainer ranks as verl's worker group."""

from __future__ import annotations

from typing import Any

import ray
from verl.plugin.platform import get_platform
from verl.single_controller.ray import RayClassWithInitArgs, RayResourcePool, RayWorkerGroup

from omni_rollout.config import Placement, TrainConfig
from omni_rollout.integrations.verl import NAME
from omni_rollout.integrations.verl.colocated import ColocatedRank
from omni_rollout.integrations.verl.rank import TrainerRank
from omni_rollout.integrations.verl.records import RUNTIME_ENV


def rank_group(run: TrainConfig, section: Any) -> RayWorkerGroup:
    """`trainer.ranks` processes, each with a GPU of its own where there are any; `section`: ours of verl's configuration."""
    device = get_platform().device_name
    pool = RayResourcePool(
        process_on_nodes=[1] * run.trainer.ranks, use_gpu=device != "cpu", max_colocate_count=1, name_prefix=NAME
    )
    rank = ray.remote(ColocatedRank if run.rollout.placement is Placement.colocated else TrainerRank)
    worker = RayClassWithInitArgs(cls=rank, section=section)
    return RayWorkerGroup(resource_pool=pool, ray_cls_with_init=worker, device_name=device, worker_env=RUNTIME_ENV["env_vars"])
