"""What the exact profile sets of CUDA, and how it cuts products and attention there: all of it looked at without a GPU."""

from __future__ import annotations

import os

import pytest
import torch

from omni_rollout.diffusion import attention
from omni_rollout.diffusion.machine import PINNED_WORKSPACE, WORKSPACE, check_workspace
from omni_rollout.diffusion.products import (
    ALIGNMENT,
    CONDITIONING_ROWS,
    CUDA_ROWS,
    NARROW_ROWS,
    WIDE_ROWS,
    _aligned,
    block_rows,
)
from omni_rollout.errors import PinnedKnobError


def test_rows_of_a_block_depend_on_layer_and_device_alone():
    narrow, wide = (64, 64), (3072, 3072)
    assert [block_rows(*shape, conditioning=False, device="cpu") for shape in (narrow, wide)] == [NARROW_ROWS, WIDE_ROWS]
    assert [block_rows(*shape, conditioning=False, device="cuda") for shape in (narrow, wide)] == [CUDA_ROWS, CUDA_ROWS]
    assert {block_rows(*wide, conditioning=True, device=device) for device in ("cpu", "cuda")} == {CONDITIONING_ROWS}


def test_what_begins_anywhere_is_copied_to_where_torch_would_put_it():
    memory = torch.arange(1024.0)
    start = -memory.data_ptr() // memory.itemsize % (ALIGNMENT // memory.itemsize)
    whole, shifted = memory[start : start + 256], memory[start + 1 : start + 257]
    assert _aligned(whole) is whole
    copied = _aligned(shifted)
    assert torch.equal(copied, shifted) and copied.data_ptr() != shifted.data_ptr()


def test_the_workspace_is_set_by_an_import_and_refused_by_name_when_it_is_another(monkeypatch):
    cuda = torch.device("cuda")
    assert os.environ[WORKSPACE] == PINNED_WORKSPACE
    check_workspace(cuda)
    monkeypatch.setenv(WORKSPACE, ":16:8")
    check_workspace(torch.device("cpu"))
    with pytest.raises(PinnedKnobError, match=r"CUBLAS_WORKSPACE_CONFIG to :4096:8, here it is :16:8"):
        check_workspace(cuda)
    monkeypatch.delenv(WORKSPACE)
    with pytest.raises(PinnedKnobError, match="here it is not set"):
        check_workspace(cuda)


def test_attention_sees_one_sample_a_call_on_a_gpu_with_its_own_mask(monkeypatch):
    monkeypatch.setattr(attention, "BY_SAMPLE", {"cpu"})
    query = torch.arange(3.0).view(3, 1, 1, 1).expand(3, 5, 2, 4)
    mask = torch.arange(3)[:, None].expand(3, 5)
    seen: list[tuple[int, int, int]] = []

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        assert mask is not None
        seen.append((len(query), int(query[0, 0, 0, 0]), int(mask[0, 0])))
        return value

    assert torch.equal(attention.exact_attention(attend, query, query, query, mask), query)
    assert seen == [(1, 0, 0), (1, 1, 1), (1, 2, 2)]
