"""Measures the simulation's parameters that a machine without accelerators and without a network can give.

    python -m benchmarks.simulation.measure engine     # seconds of a denoising step by batch size, nano model
    python -m benchmarks.simulation.measure digest     # GB/s
    python -m benchmarks.simulation.measure store      # a trajectory into TransferQueue
    python -m benchmarks.simulation.measure objects    # weights through Ray's object store
    python -m benchmarks.simulation.measure transfer   # and from one Ray node to another

Prints JSON. Machines are noisy: a figure is the best of several tries, the engine's is processor time.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

NANO = Path(__file__).parents[2] / "recipes" / "nano" / "checkpoint"
GB = 1e9


def best(tries: int, call: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    seconds = []
    for _ in range(tries):
        start = clock()
        call()
        seconds.append(clock() - start)
    return min(seconds)


# (max_num_seqs, denoising steps of each of the images, images in one call of the engine)
ENGINE_CASES: dict[str, tuple[int, list[int], int]] = {
    **{f"{n} at a time, 10 steps": (n, [10] * 16, 16) for n in (1, 2, 4, 8, 16)},
    "16 at a time, 20 steps": (16, [20] * 16, 16),
    "4 at a time, 10 steps, calls of 4": (4, [10] * 16, 4),
    "4 at a time, 20 to 5 steps": (4, list(range(20, 4, -1)), 16),
    "4 at a time, 20 to 5 steps, calls of 4": (4, list(range(20, 4, -1)), 4),
}


def nano_requests(steps: Sequence[int]) -> list[Any]:
    from omni_rollout.models.qwen_image.spec import resolve
    from omni_rollout.types import Prompt, RolloutRequest

    sizes = {"height": 64, "width": 64, "prompt_width": 24, "true_cfg_scale": 1.0}
    return [
        RolloutRequest(
            request_id=str(index),
            prompt=Prompt(text=f'a red sign that says "{index:02d}"'),
            spec=resolve({**sizes, "num_inference_steps": count}),
            seed=index,
            group_id=str(index),
            member=0,
        )
        for index, count in enumerate(steps)
    ]


def engine() -> dict[str, float]:
    """Processor seconds of each of ENGINE_CASES, one thread."""
    import torch

    from omni_rollout.rollout.engine import RolloutEngine

    seconds: dict[str, float] = {}
    for max_num_seqs in (1, 2, 4, 8, 16):
        with RolloutEngine(str(NANO), max_num_seqs=max_num_seqs) as sampler:
            torch.set_num_threads(1)
            for name, (wanted, steps, at_once) in ENGINE_CASES.items():
                if wanted != max_num_seqs:
                    continue

                def sample(sampler: RolloutEngine = sampler, steps: list[int] = steps, at_once: int = at_once) -> None:
                    requests = nano_requests(steps)
                    for start in range(0, len(requests), at_once):
                        list(sampler.generate(requests[start : start + at_once]))

                sample()
                seconds[name] = best(8, sample, time.process_time)
    return seconds


def digest() -> dict[str, Any]:
    """GB/s of sha256, one tensor after another, and in as many threads as there are cores."""
    import torch

    from omni_rollout.trajectories.digest import tensor_digest, tensor_digests

    named = [(str(index), torch.ones(16 << 20, dtype=torch.bfloat16)) for index in range(16)]
    gigabytes = sum(tensor.nbytes for _, tensor in named) / GB
    one = best(12, lambda: [tensor_digest(tensor) for _, tensor in named])
    return {
        "one_GB_per_s": gigabytes / one,
        "cores": os.cpu_count(),
        "all_GB_per_s": gigabytes / best(12, lambda: tensor_digests(named)),
    }


def trajectory(size: int, width: int, embedding: int, serial: int) -> Any:
    import numpy as np
    import torch

    from omni_rollout.types import Prompt, SamplingSpec, Trajectory

    tokens = (size // 16) ** 2
    return Trajectory(
        latents=torch.zeros(3, tokens, 64),
        log_probs=torch.zeros(2),
        step_indices=torch.tensor([0, 1]),
        sigmas=torch.zeros(11),
        timesteps=torch.zeros(10),
        prompt_embeds=torch.zeros(width, embedding, dtype=torch.bfloat16),
        prompt_embeds_mask=torch.ones(width, dtype=torch.bool),
        negative_prompt_embeds=None,
        negative_prompt_embeds_mask=None,
        media=np.zeros((size, size, 3), np.uint8),
        prompt=Prompt(text="a cat", metadata={"text": "7"}),
        spec=SamplingSpec(
            height=size,
            width=size,
            num_inference_steps=10,
            true_cfg_scale=1.0,
            negative_prompt=None,
            noise_level=0.7,
            sde_type="sde",
            log_prob_form="gaussian",
            step_indices=(0, 1),
            prompt_width=width,
            negative_prompt_width=width,
        ),
        seed=serial,
        group_id="group",
        member=serial,
        policy_version=1,
        fingerprint={"weights": "0" * 64},
    )


def start_ray() -> None:
    import ray

    ray.init(num_cpus=16, include_dashboard=False, object_store_memory=4 << 30, log_to_driver=False)


def store() -> dict[str, Any]:
    """Seconds of the agent loop per trajectory: taken from Ray, put into TransferQueue; nano, and a 512 px image's sizes."""
    import asyncio

    import ray
    import transfer_queue as tq

    from omni_rollout.integrations.verl.agent_loop import to_sample

    start_ray()
    tq.init()
    results = {}
    loop = asyncio.new_event_loop()
    for name, sizes in {"nano": (64, 24, 64), "512 px": (512, 256, 3584)}.items():
        count = 40
        references = [ray.put(trajectory(*sizes, index)) for index in range(count)]

        async def one(reference: Any) -> None:
            taken = await reference
            score = {"reward_score": 1.0, "reward_extra_info": {}}
            await tq.async_kv_batch_put(**to_sample(taken, score, 1, "train"))

        async def all_of_them(references: Sequence[Any] = references) -> None:
            await asyncio.gather(*[one(reference) for reference in references])

        tensors = [value.nbytes for value in vars(trajectory(*sizes, 0)).values() if hasattr(value, "nbytes")]
        wall = best(3, lambda run=all_of_them: loop.run_until_complete(run())) / count
        own = best(3, lambda run=all_of_them: loop.run_until_complete(run()), time.process_time) / count
        results[name] = {"MB": sum(tensors) / 1e6, "seconds": wall, "processor_seconds_of_the_agent_loop": own}
    return results


class Process:
    """An actor that puts weights into the store of its node, or gets them."""

    def put(self, tensors: int) -> tuple[list[Any], float]:
        import ray
        import torch

        bucket = [(str(i), torch.ones(16 << 19, dtype=torch.bfloat16)) for i in range(tensors)]
        start = time.perf_counter()
        references = [ray.put(bucket) for _ in range(32 // tensors)]
        return references, time.perf_counter() - start

    def get(self, references: list[Any]) -> float:
        import ray

        start = time.perf_counter()
        assert all(tensor.nbytes for bucket in ray.get(references) for _, tensor in bucket)
        return time.perf_counter() - start


def objects() -> dict[str, Any]:
    """GB/s of weights into Ray's object store, and out of it in another process, by bucket size; tensors as Ray sends them by
    itself, and as it does in the processes of the verl back end."""
    import ray

    from omni_rollout.integrations.verl.records import RUNTIME_ENV

    start_ray()
    results = {}
    gigabytes = 32 * (16 << 20) / GB
    for kind, environment in (("by itself", {}), ("verl back end", RUNTIME_ENV)):
        writer: Any = ray.remote(runtime_env=environment)(Process).remote()
        reader: Any = ray.remote(runtime_env=environment)(Process).remote()
        for tensors in (1, 4, 16, 32):
            tries = []
            for _ in range(5):
                references, written = ray.get(writer.put.remote(tensors))
                tries.append((written, ray.get(reader.get.remote(references))))
            written, read = (gigabytes / min(times) for times in zip(*tries, strict=True))
            results[f"{16 * tensors} MB, {kind}"] = {"put_GB_per_s": round(written, 2), "get_GB_per_s": round(read, 2)}
    return results


def transfer() -> dict[str, float]:
    """GB/s from one Ray node to another, both on this machine: what Ray itself allows, with no wire between."""
    import ray
    from ray.cluster_utils import Cluster

    from omni_rollout.integrations.verl.records import RUNTIME_ENV

    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 2, "object_store_memory": 2 << 30, "resources": {"head": 1}}
    )
    cluster.add_node(num_cpus=2, object_store_memory=2 << 30, resources={"other": 1})
    ray.init(address=cluster.address, log_to_driver=False)
    writer: Any = ray.remote(runtime_env=RUNTIME_ENV, resources={"head": 1})(Process).remote()
    reader: Any = ray.remote(runtime_env=RUNTIME_ENV, resources={"other": 1})(Process).remote()
    results = {}
    for tensors in (1, 4, 16, 32):
        tries = []
        for _ in range(5):
            references, _ = ray.get(writer.put.remote(tensors))
            tries.append(ray.get(reader.get.remote(references)))
        results[f"{16 * tensors} MB"] = round(32 * (16 << 20) / GB / min(tries), 2)
    ray.shutdown()
    cluster.shutdown()
    return results


if __name__ == "__main__":
    print(json.dumps({name: globals()[name]() for name in sys.argv[1:]}, indent=1))
