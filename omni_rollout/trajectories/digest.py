"""Weights on their way: a few at a time, and digests, which prove that two processes hold the same bits."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor

import torch

from omni_rollout.models.base.stowed import memory

BUCKET_BYTES = 256 << 20
THREADS = 16  # at most; each holds a copy of one tensor when the weights are on an accelerator


def tensor_digest(tensor: torch.Tensor) -> str:
    """sha256 over dtype, shape and bytes."""
    digest = hashlib.sha256(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    whole = tensor.detach().cpu().contiguous()
    digest.update(memory(whole))
    return digest.hexdigest()


def tensor_digests(named: Iterable[tuple[str, torch.Tensor]]) -> dict[str, str]:
    """`tensor_digest` of each, several at a time: a sync of large weights waits for sha256, which lets threads run."""
    names, tensors = zip(*named, strict=True) if (named := list(named)) else ((), ())
    with ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1)) as pool:
        return dict(zip(names, pool.map(tensor_digest, tensors), strict=True))


def buckets(named: Iterable[tuple[str, torch.Tensor]], limit: int = BUCKET_BYTES) -> Iterator[list[tuple[str, torch.Tensor]]]:
    """Cut into runs of at most `limit` bytes, each when it is asked for; a tensor larger than that is a bucket of its own."""
    bucket: list[tuple[str, torch.Tensor]] = []
    free = limit
    for name, tensor in named:
        if tensor.nbytes > free and bucket:
            yield bucket
            bucket, free = [], limit
        bucket.append((name, tensor))
        free -= tensor.nbytes
    if bucket:
        yield bucket


def same_memory(tensor: torch.Tensor, other: torch.Tensor | None) -> bool:
    """Whether the two are one tensor: writing into either writes into both."""
    if other is None or tensor.device != other.device or tensor.dtype != other.dtype:
        return False
    places = [(one.data_ptr(), one.shape, one.stride()) for one in (tensor, other)]
    return places[0] == places[1]


def combined_digest(digests: Mapping[str, str]) -> str:
    """One digest for a whole model, from those of its tensors, whatever their order."""
    return hashlib.sha256("".join(f"{name}{digests[name]}" for name in sorted(digests)).encode()).hexdigest()
