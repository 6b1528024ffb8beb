"""How far a policy is from where its run started, told from a sample of its weights as the engine is sent them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import torch

SAMPLED = 4096  # values of a tensor at most, evenly spaced: a copy of the whole policy would cost its size in memory


class Drift:
    """`value` is |w - w0| / |w0|, Euclidean, over the sampled values of all tensors; 0 before the first `watch`.

    Of a LoRA: of its merged weights. In bfloat16 what is smaller than its rounding is not seen, by the engine either.

    Args:
        start: the weights that the run started from, by name, in the dtype that the engine is sent.
    """

    def __init__(self, start: Iterable[tuple[str, torch.Tensor]]) -> None:
        self.value = 0.0
        self._start = {name: _sample(tensor) for name, tensor in start}

    def watch(self, named: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """The same tensors; when the last has been taken, `value` is theirs."""
        moved = whole = 0.0
        for name, tensor in named:
            start = self._start[name].double()
            moved += (_sample(tensor).double() - start).square().sum().item()
            whole += start.square().sum().item()
            yield name, tensor
        self.value = math.sqrt(moved / whole) if whole else 0.0


@torch.no_grad()
def _sample(tensor: torch.Tensor) -> torch.Tensor:
    flat = tensor.detach().flatten()
    return flat[:: max(1, math.ceil(len(flat) / SAMPLED))].to("cpu", torch.float32, copy=True)
