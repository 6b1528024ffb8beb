"""What DeepSpeed is told, and why."""

from __future__ import annotations

from typing import Any

from omni_rollout.config import Offload

BUCKET = 500_000_000  # numbers, DeepSpeed's own default: gradients are reduced in pieces of this size


def deepspeed_config(zero_stage: int, offload: Offload, trained: int) -> dict[str, Any]:
    zero: dict[str, Any] = {
        "stage": zero_stage,
        "reduce_bucket_size": min(trained, BUCKET),  # allocated whole, whatever there is to put into it
        # The memory-efficient linear replaces F.linear for the whole process, the rollout's included.
        "memory_efficient_linear": False,
    }
    if zero_stage == 3:
        # Every parameter is given back after its layer: else what is written to the parts is not seen by the next forward.
        zero |= {"stage3_param_persistence_threshold": 0, "stage3_max_reuse_distance": 0}
        # Parameter by parameter, one ahead at each layer. Else up to a billion numbers are, in flat buffers, each copied into
        # parameters, and stays until the last of these is used.
        zero["stage3_allgather_sequential"] = True
    if offload is not Offload.none:
        zero["offload_optimizer"] = {"device": "cpu"}
    if offload is Offload.all:
        zero["offload_param"] = {"device": "cpu"}
    return {
        "train_micro_batch_size_per_gpu": 1,  # required, and unused: the caller weighs its micro-batches
        "gradient_accumulation_steps": 1,  # the boundary is set before each backward
        # A torch optimizer is not on DeepSpeed's list; one that DeepSpeed builds is compiled for minutes, on the CPU too.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
        "gradient_clipping": 0.0,  # clipped in step(); left out, it would be 1.0
        "steps_per_print": 10**9,
    }
