"""AdamW in plain PyTorch on every rank of torch's process group, on the sum of all ranks' gradients.

The ranks may have different numbers of micro-batches, or none: they meet once, in `step`. All start from the same weights
and make the same step, so they stay the same.
"""

from __future__ import annotations

from collections.abc import Collection

import torch.distributed as dist

from omni_rollout.policy.trainer_engines.torch_engine import TorchEngine, fill_missing_gradients, moved


class DataParallelEngine(TorchEngine):
    def step(self, learning_rate: float, idle: Collection[str] = ()) -> float:
        for gradient in fill_missing_gradients(moved(self._groups, idle)):
            dist.all_reduce(gradient)
        self._ready = True
        return super().step(learning_rate, idle)
