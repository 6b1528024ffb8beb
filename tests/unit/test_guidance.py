"""Guidance against plain loops and against diffusers' own expression."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from omni_rollout.diffusion.guidance import guide
from omni_rollout.models.base.velocity import Conditioning, velocity
from omni_rollout.models.qwen_image.spec import resolve


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


@pytest.mark.parametrize(
    ("tokens", "negative_tokens", "width", "calls"),
    [((4, 4), (3, 2), 4, [4]), ((3, 1), (2, 3), 4, [4]), ((4, 4), (4, 4), 4, [4]), ((3, 1), (2, 2), 3, [2, 2])],
    ids=["one branch is padded", "both are", "neither is", "widths differ"],
)
def test_both_branches_share_a_pass_where_their_widths_agree(tokens, negative_tokens, width, calls):
    """And each row's velocity is the one of two passes: a row does not see its company."""
    sizes = {"height": 32, "width": 32, "prompt_width": 4, "negative_prompt_width": width}
    spec = resolve({**sizes, "true_cfg_scale": 4.0})
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 4, 64, generator=generator)

    def padded(valid: int, width: int = 4) -> dict[str, torch.Tensor]:
        return {"embeds": torch.randn(width, 8, generator=generator), "mask": torch.arange(width) < valid}

    rows = [
        Conditioning(
            prompt_embeds=(own := padded(valid))["embeds"],
            prompt_embeds_mask=own["mask"],
            negative_prompt_embeds=(other := padded(less, width))["embeds"],
            negative_prompt_embeds_mask=other["mask"],
            spec=spec,
        )
        for valid, less in zip(tokens, negative_tokens, strict=True)
    ]
    seen: list[int] = []

    def network(**given: Any) -> torch.Tensor:
        seen.append(len(given["hidden_states"]))
        assert len(given["timestep"]) == len(given["img_shapes"]) == len(given["encoder_hidden_states"]) == seen[-1]
        mask = given["encoder_hidden_states_mask"]
        text = given["encoder_hidden_states"] if mask is None else given["encoder_hidden_states"] * mask[..., None]
        return given["hidden_states"] * text.sum((1, 2))[:, None, None] + given["timestep"][:, None, None]

    times = torch.tensor([700.0, 300.0])
    found = velocity(network, latents, times, rows, torch.float32)
    assert seen == calls

    def alone(embeds: torch.Tensor, mask: torch.Tensor, row: int) -> torch.Tensor:
        return latents[row] * (embeds * mask[:, None]).sum() + times[row] / 1000

    positive = torch.stack([alone(one.prompt_embeds, one.prompt_embeds_mask, row) for row, one in enumerate(rows)])
    negative = torch.stack(
        [alone(one.negative_prompt_embeds, one.negative_prompt_embeds_mask, row) for row, one in enumerate(rows)]
    )
    torch.testing.assert_close(found, guide(positive, negative, 4.0, renormalise=True))
