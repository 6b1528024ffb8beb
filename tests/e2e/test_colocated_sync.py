"""What a weight sync puts into the object store: the policy where engines are apart, nothing where they are colocated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

pytest.importorskip("verl")

import ray
import transfer_queue as tq
from ray._private.internal_api import get_memory_info_reply, get_state_from_address
from verl.single_controller.ray import RayClassWithInitArgs, RayResourcePool, RayWorkerGroup

from omni_rollout.integrations.verl.colocated import ColocatedRank
from omni_rollout.integrations.verl.launch import verl_config
from omni_rollout.integrations.verl.rank import TrainerRank
from omni_rollout.integrations.verl.records import RUNTIME_ENV, run_config, to_section
from omni_rollout.launch.compose import compose

pytestmark = pytest.mark.slow

RANKS = 2


def in_store() -> int:
    """Bytes, of the whole cluster."""
    return get_memory_info_reply(
        get_state_from_address(ray.get_runtime_context().gcs_address)
    ).store_stats.object_store_bytes_used


def put_by_a_sync(kind: type, section: Any) -> int:
    pool = RayResourcePool(process_on_nodes=[1] * RANKS, use_gpu=False, max_colocate_count=1, name_prefix=kind.__name__)
    made = RayClassWithInitArgs(cls=ray.remote(kind), section=section)
    group: Any = RayWorkerGroup(
        resource_pool=pool, ray_cls_with_init=made, device_name="cpu", worker_env=RUNTIME_ENV["env_vars"]
    )
    group.init_model(None)
    before = in_store()
    published = ray.get(group.publish(1))
    after = in_store()
    assert len({weights.digest for weights in published}) == 1
    for worker in group.workers:
        ray.kill(worker)
    return after - before


def test_nothing_goes_through_the_object_store_to_an_engine_beside_its_rank(random_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a red cat\n")
    given = [f"model.path={random_checkpoint}", f"prompts={tmp_path / 'prompts.txt'}", "backend=verl", "threads=1"]
    config = compose([*given, f"trainer.ranks={RANKS}", "trainer.engine=fsdp2", "rollout.placement=colocated"])
    assert run_config(verl_config(config).omni_rollout) == config
    section = to_section(config)
    weights = load_file(random_checkpoint / "transformer/diffusion_pytorch_model.safetensors")
    size = sum(tensor.numel() * tensor.element_size() for tensor in weights.values())
    ray.init(num_cpus=8, include_dashboard=False, object_store_memory=512 << 20)
    try:
        tq.init()
        assert put_by_a_sync(ColocatedRank, section) == 0
        assert size <= put_by_a_sync(TrainerRank, section) < 1.1 * size
    finally:
        ray.shutdown()
