"""Memory that leaves and comes back in place: the same bits, seen by all who share it, and no memory while it is away."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from omni_rollout.errors import RunFailedError
from omni_rollout.models.base.stowed import Stowed

DTYPES = [torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool]


def some(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Any bits, those that are no numbers too."""
    size = int(np.prod(shape)) * dtype.itemsize
    raw = torch.randint(0, 2 if dtype is torch.bool else 256, (size,), generator=torch.Generator().manual_seed(seed))
    return raw.to(torch.uint8).view(dtype).reshape(shape).clone()


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().flatten().view(torch.uint8).clone()


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(st.lists(st.integers(0, 7), max_size=3), st.sampled_from(DTYPES)), max_size=6), st.booleans())
def test_every_bit_comes_back_where_it_was(tmp_path_factory: Any, shapes: list[tuple[list[int], torch.dtype]], constant: bool):
    tensors = [some(tuple(shape), dtype, seed) for seed, (shape, dtype) in enumerate(shapes)]
    stowed = Stowed(lambda: tensors, tmp_path_factory.getbasetemp(), constant=constant)
    for _ in range(2):
        before = [bits(tensor) for tensor in tensors]
        stowed.leave()
        stowed.leave()
        assert all(not tensor.untyped_storage().nbytes() for tensor in tensors)
        stowed.come_back()
        stowed.come_back()
        assert all(torch.equal(bits(tensor), old) for tensor, old in zip(tensors, before, strict=True))


def test_views_ties_and_parameters_see_what_was_written_in_between(tmp_path: Path) -> None:
    fused = torch.arange(12.0).reshape(3, 4)
    parts, parameter = fused.chunk(3), nn.Parameter(fused)
    stowed = Stowed(lambda: [*parts, parameter], tmp_path)
    stowed.leave()
    assert not parts[1].untyped_storage().nbytes() and not parameter.untyped_storage().nbytes()
    stowed.come_back()
    with torch.no_grad():
        parameter[1] = 7
    stowed.leave()
    stowed.come_back()
    assert torch.equal(parts[1], torch.full((1, 4), 7.0)) and torch.equal(parts[2], torch.arange(8.0, 12)[None])


def test_what_is_constant_is_written_once_and_what_is_not_each_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[int] = []
    original = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda *words: (written.append(len(words[1])), original(*words))[1])
    for constant, expected in ((True, [400]), (False, [400, 400])):
        written.clear()
        tensor = torch.ones(100)
        stowed = Stowed(lambda tensor=tensor: [tensor], tmp_path, constant=constant)
        for _ in range(2):
            stowed.leave()
            stowed.come_back()
        assert written == expected


def test_tensors_are_asked_for_each_time(tmp_path: Path) -> None:
    tensors: list[torch.Tensor] = []
    stowed = Stowed(lambda: tensors, tmp_path)
    for size in (0, 3, 5, 5):
        tensors[:] = [torch.full((size,), float(size))] if size else []
        stowed.leave()
        stowed.come_back()
        assert all(torch.equal(tensor, torch.full((size,), float(size))) for tensor in tensors)


def test_memory_that_torch_does_not_own_stays(tmp_path: Path) -> None:
    foreign = torch.from_numpy(np.ones(4, dtype=np.float32))
    stowed = Stowed(lambda: [foreign], tmp_path)
    stowed.leave()
    assert torch.equal(foreign, torch.ones(4))
    stowed.come_back()
    assert torch.equal(foreign, torch.ones(4))


def test_a_full_disk_is_told_and_nothing_has_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.ones(100)
    stowed = Stowed(lambda: [tensor], tmp_path)

    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(RunFailedError, match=r"No space left on device.*make room, or leave out"):
        stowed.leave()
    assert torch.equal(tensor, torch.ones(100))
    assert not list(tmp_path.iterdir()), "the file has no name"
