"""Digests of weights: what proves that two processes hold the same bits."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor

import torch

THREADS = 16  # at most; each holds a copy of one tensor when the weights are on an accelerator


def tensor_digest(tensor: torch.Tensor) -> str:
    """sha256 over dtype, shape and bytes."""
    digest = hashlib.sha256(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def tensor_digests(named: Iterable[tuple[str, torch.Tensor]]) -> dict[str, str]:
    """`tensor_digest` of each, several at a time: a sync of large weights waits for sha256, which lets threads run."""
    names, tensors = zip(*named, strict=True) if (named := list(named)) else ((), ())
    with ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1)) as pool:
        return dict(zip(names, pool.map(tensor_digest, tensors), strict=True))


def combined_digest(digests: Mapping[str, str]) -> str:
    """One digest for a whole model, from those of its tensors, whatever their order."""
    return hashlib.sha256("".join(f"{name}{digests[name]}" for name in sorted(digests)).encode()).hexdigest()
