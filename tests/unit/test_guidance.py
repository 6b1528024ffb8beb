"""Guidance against plain loops and against diffusers' own expression."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from omni_rollout.diffusion.guidance import guide


def branches(seed: int = 0, shape: tuple[int, ...] = (3, 5, 8)) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)


@given(scale=st.floats(0.0, 10.0, width=32), seed=st.integers(0, 2**31))
@settings(deadline=None, max_examples=50)
def test_equals_the_formula_in_plain_loops(scale: float, seed: int) -> None:
    positive, negative = branches(seed, (1, 3, 4))
    guided = guide(positive, negative, scale)
    for token in range(3):
        p, n = positive[0, token].tolist(), negative[0, token].tolist()
        combined = [n_ + scale * (p_ - n_) for p_, n_ in zip(p, n, strict=True)]
        factor = math.hypot(*p) / math.hypot(*combined)
        torch.testing.assert_close(guided[0, token], torch.tensor([factor * c for c in combined]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scale", [1.5, 4.0, 7.5])
def test_equals_the_expression_of_diffusers(scale: float) -> None:
    positive, negative = branches()
    combined = negative + scale * (positive - negative)
    expected = combined * (torch.norm(positive, dim=-1, keepdim=True) / torch.norm(combined, dim=-1, keepdim=True))
    assert torch.equal(guide(positive, negative, scale), expected)


def test_scale_one_is_the_positive_branch() -> None:
    positive, negative = branches()
    torch.testing.assert_close(guide(positive, negative, 1.0), positive, rtol=1e-6, atol=1e-6)


def test_the_norm_of_every_token_is_that_of_the_positive_branch() -> None:
    positive, negative = branches()
    torch.testing.assert_close(guide(positive, negative, 4.0).norm(dim=-1), positive.norm(dim=-1))


def test_a_zero_combination_stays_zero() -> None:
    positive, negative = branches()
    negative[1, 2], positive[1, 2] = 2.0, 1.0  # 2 + 2 * (1 - 2) = 0
    guided = guide(positive, negative, 2.0)
    assert torch.equal(guided[1, 2], torch.zeros(8))
    assert guided.isfinite().all() and (guided.norm(dim=-1) > 0).sum() == 14


@pytest.mark.parametrize("tokens", [1, 16, 257])
def test_rows_of_a_batch_are_the_rows_alone(tokens: int) -> None:
    positive, negative = branches(shape=(4, tokens, 64))
    scales = torch.tensor([0.0, 1.0, 4.0, 7.3])
    together = guide(positive, negative, scales)
    for row in range(4):
        one = slice(row, row + 1)
        assert torch.equal(together[one], guide(positive[one].clone(), negative[one].clone(), scales[row].item()))


def test_bf16_branches_are_combined_in_fp32() -> None:
    positive, negative = (branch.bfloat16() for branch in branches())
    guided = guide(positive, negative, 4.0)
    assert guided.dtype == torch.float32
    assert torch.equal(guided, guide(positive.float(), negative.float(), 4.0))
    assert not torch.equal(guided, guided.bfloat16().float())
