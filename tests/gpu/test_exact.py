"""The claim on a CUDA device: `pytest -m gpu tests/gpu`. Not run on one yet; the same bodies run on a CPU, small."""

from __future__ import annotations

import pytest
import torch

from omni_rollout.diffusion.attention import BY_SAMPLE
from omni_rollout.diffusion.machine import machine
from omni_rollout.diffusion.products import CONDITIONING_ROWS, CUDA_ROWS, block_rows
from omni_rollout.diffusion.self_check import attention_shape, linear_layers, self_check
from omni_rollout.policy.lora import attach_lora


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("images", [1, 3, 8])
def test_log_probs_are_equal_whatever_the_batch(sides, images, guidance):
    trajectories = sides.generate(sides.requests(images, true_cfg_scale=guidance))
    assert {size for t in trajectories for size in t.fingerprint["batch_sizes"]} <= set(range(1, images + 1))
    assert [sides.gap(trajectories, micro_batch_size) for micro_batch_size in (1, 3, 8)] == [0.0, 0.0, 0.0]


def test_without_a_mask_attention_may_take_another_kernel_on_both_sides(sides):
    longest = max(int(t.prompt_embeds_mask.sum()) for t in sides.generate(sides.requests(2)))
    for images in (2, 8):
        trajectories = sides.generate(sides.requests(images, prompt_width=longest))
        assert {bool(t.prompt_embeds_mask.all()) for t in trajectories} == {True, False}
        assert [sides.gap(trajectories, micro_batch_size) for micro_batch_size in (1, 8)] == [0.0, 0.0]


def test_an_image_has_the_same_bits_alone_and_in_company(sides):
    together = sides.generate(sides.requests(8))
    alone = sides.generate(sides.requests(1))
    assert torch.equal(together[0].latents, alone[0].latents)


def test_an_update_of_an_adapter_reaches_the_engine_with_all_its_bits(sides):
    policy = sides.load()
    for factor in attach_lora(policy, rank=4, alpha=None, seed=0):
        noise = torch.randn(factor.shape, generator=torch.Generator().manual_seed(7))
        factor.data += 0.05 * noise.to(factor.device)
    before = sides.generate(sides.requests(3))
    sides.sync(policy)
    try:
        after = sides.generate(sides.requests(3))
        assert not torch.equal(before[0].latents, after[0].latents)
        assert [sides.gap(after, micro_batch_size, policy) for micro_batch_size in (1, 8)] == [0.0, 0.0]
    finally:
        sides.sync(sides.policy)


def test_sizes_and_guidance_mixed(sides):
    shapes = [{"height": sides.pixels}, {"height": 2 * sides.pixels}, {"true_cfg_scale": 4.0}, {"prompt_width": 64}]
    requests = [sides.requests(seed + 1, **shape)[seed] for seed, shape in enumerate(shapes * 2)]
    trajectories = sides.generate(requests)
    assert len({t.image.shape for t in trajectories}) == 2
    assert [sides.gap(trajectories, micro_batch_size) for micro_batch_size in (1, 8)] == [0.0, 0.0]


def test_the_comparison_can_fail(sides):
    other = sides.load()
    with torch.no_grad():
        other.proj_out.weight.mul_(1.01)
    assert sides.gap(sides.generate(sides.requests(1)), 1, other) > 0


def test_both_sides_pass_the_self_check_and_agree(sides):
    device = torch.device(sides.device)
    heads, head_dim = attention_shape(sides.policy)
    found = self_check(linear_layers(sides.policy), heads=heads, head_dim=head_dim, dtype=sides.dtype, device=device)
    assert found == sides.engine.machine
    rows = {
        block_rows(layer.out_features, layer.in_features, conditioning=False, device=sides.device)
        for layer in linear_layers(sides.policy)
    }
    assert found["calls"] == f"blocks of {', '.join(map(str, [CONDITIONING_ROWS, *sorted(rows)]))} rows"
    assert (rows == {CUDA_ROWS}) == (sides.device == "cuda")
    assert found["switches"].startswith("cuBLAS workspace" if sides.device == "cuda" else "pinned")


def test_nothing_of_the_engine_keeps_its_own_kernel(sides):
    knobs = sides.engine._rpc("pinned_knobs")
    assert (knobs["native"], knobs["linear"], knobs["compiled"]) == (True, True, False)
    assert knobs["attention"] == ["ExactSDPAImpl" if sides.device == "cuda" else "ExactCpuSDPAImpl"]


def test_one_sample_a_call_changes_no_bit_where_one_call_is_exact(sides, monkeypatch):
    """What a GPU always does, done on a CPU: both sides by their own code, masks included."""
    if sides.device == "cuda":
        pytest.skip("a GPU has no other way")
    whole = sides.generate(sides.requests(3, true_cfg_scale=4.0))
    monkeypatch.setattr("omni_rollout.diffusion.attention.BY_SAMPLE", BY_SAMPLE | {"cpu"})
    assert sides.gap(whole, 3) == 0.0


def test_a_switch_that_is_turned_back_is_named(sides):
    matmul = torch.backends.cuda.matmul
    matmul.allow_bf16_reduced_precision_reduction = True
    try:
        assert "bf16_reduced_precision_reduction=True" in machine(torch.device(sides.device))["switches"]
    finally:
        matmul.allow_bf16_reduced_precision_reduction = False
