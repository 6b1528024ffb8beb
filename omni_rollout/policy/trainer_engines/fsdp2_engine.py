"""AdamW in plain PyTorch over FSDP2's shards: parameters, gradients, moments, cut over the ranks of torch's process group.

The transformer blocks are gathered one at a time in forward and backward, in fp32: what a rank computes with is, bit for bit,
what an unsharded one would. Gradients are summed over the ranks once an update, so until then every rank holds those of all
trained parameters whole, in fp32; where that is too much, `trainer.reduce=backward` sums after every backward pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from omni_rollout.config import Offload, Reduce, TrainerConfig
from omni_rollout.diffusion.machine import compute_device
from omni_rollout.models.base.policy import experts
from omni_rollout.policy.tensor_files import Pending
from omni_rollout.policy.trainer_engines.torch_engine import TorchEngine, check_shape, total_norm_of_parts, trainable_by_name


class FSDP2Engine(TorchEngine):
    """Takes a policy that lies on the CPU: each block goes to the rank's GPU as it is cut, never the whole policy."""

    def __init__(self, config: TrainerConfig, policy: nn.Module, parameters: list[nn.Parameter]) -> None:
        names = list(trainable_by_name(policy, parameters))
        device = compute_device().type
        self._mesh = init_device_mesh(device, (dist.get_world_size(),))
        # Parameters and optimizer go together: the optimizer steps where the shards are.
        whole_on_cpu = CPUOffloadPolicy(pin_memory=device != "cpu")
        self._offload = whole_on_cpu if config.offload is Offload.all else OffloadPolicy()
        self._every_pass = config.reduce is Reduce.backward
        shard(policy, self._mesh, self._offload)
        sharded = dict(policy.named_parameters())
        super().__init__(config, policy, [sharded[name] for name in names])

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        cast(FSDPModule, self.module).set_requires_gradient_sync(last or self._every_pass)
        super().backward(loss, last=last)

    def whole(self, name: str, part: torch.Tensor) -> Pending:
        like = cast(DTensor, self._named[name])
        cut = DTensor.from_local(part, like.device_mesh, like.placements, shape=like.shape, stride=like.stride())
        return Pending(tuple(like.shape), part.dtype, cut.full_tensor)

    def part(self, name: str, whole: torch.Tensor) -> torch.Tensor:
        like = cast(DTensor, self._named[name])
        check_shape(name, whole, like.shape)
        # Every rank has the whole: nothing is sent.
        return distribute_tensor(
            whole.to(self._mesh.device_type), like.device_mesh, like.placements, src_data_rank=None
        ).to_local()

    @contextmanager
    def gathered(self, layer: nn.Module) -> Iterator[None]:
        if not isinstance(layer, FSDPModule):
            yield
            return
        layer.unshard()
        try:
            yield
        finally:
            layer.reshard()

    def frozen(self, module: nn.Module) -> nn.Module:
        return shard(module, self._mesh, self._offload)

    def _held(self, tensor: torch.Tensor) -> torch.Tensor:
        return cast(DTensor, tensor).to_local()

    def _norm(self, gradients: list[torch.Tensor]) -> float:
        return total_norm_of_parts(gradients)


def shard(module: nn.Module, mesh: DeviceMesh, offload: OffloadPolicy) -> nn.Module:
    """Cuts the parameters in place, block by block (the members of its module lists), then those outside of blocks.

    Each of several experts is a unit of its own: a step gathers nothing of the one that it does not take.
    """
    networks = list(experts(module).values())
    blocks = [block for net in networks for child in net.children() if isinstance(child, nn.ModuleList) for block in child]
    for layer in [*blocks, *(net for net in networks if net is not module), module]:
        # The root's are given back after forward too: else what is written to the shards is not seen by the next forward.
        fully_shard(layer, mesh=mesh, reshard_after_forward=True, offload_policy=offload)
        cast(FSDPModule, layer).set_gradient_divide_factor(1.0)  # a sum, not a mean
        cast(FSDPModule, layer).set_force_sum_reduction_for_comms(True)
    return module
