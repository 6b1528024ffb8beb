"""The claim, in small statements: what the engine computed is what the trainer computes, bit for bit."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from omni_rollout.errors import PinnedKnobError
from omni_rollout.policy.lora import attach_lora
from omni_rollout.types import Trajectory


def rollout_log_probs(trajectories: list[Trajectory]) -> list[torch.Tensor]:
    return [trajectory.log_probs for trajectory in trajectories]


@pytest.mark.parametrize("micro_batch_size", [1, 3, 16])
def test_log_probs_are_equal_whatever_the_micro_batch(sides, all_equal, micro_batch_size):
    trajectories = sides.generate(sides.mixed())
    assert all_equal(sides.score(trajectories, micro_batch_size), rollout_log_probs(trajectories))


def test_the_comparison_can_fail(sides, all_equal):
    """The rollout's log-prob is a function of its noise alone: only a network can tell a wrong one."""
    trajectories = sides.generate(sides.mixed())
    sides.disturb(1e-3)
    scored = sides.score(trajectories)
    sides.restore()
    assert not any(torch.equal(ours, theirs.log_probs) for ours, theirs in zip(scored, trajectories, strict=True))


def test_batches_vary_over_a_requests_life(sides):
    sizes = [trajectory.fingerprint["batch_sizes"] for trajectory in sides.generate(sides.mixed())]
    assert any(earlier != later for life in sizes for earlier, later in pairwise(life))


def test_alone_in_company_early_or_late_the_bits_are_the_same(sides):
    together = sides.generate(sides.mixed())
    alone = [next(sides.engine.generate([request])) for request in sides.mixed()]
    reversed_order = sides.generate(sides.mixed()[::-1])
    for others in (alone, reversed_order):
        for one, other in zip(together, others, strict=True):
            assert torch.equal(one.latents, other.latents)
            assert torch.equal(one.log_probs, other.log_probs)
            assert (one.image == other.image).all()


def test_another_number_of_threads_is_refused_before_anything_is_sampled(sides):
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        with pytest.raises(PinnedKnobError, match=f"threads={before + 1} here, the engine computes with {before}"):
            sides.generate(sides.mixed())
    finally:
        torch.set_num_threads(before)
    assert sides.generate(sides.mixed()[:1])[0].fingerprint["machine"]["threads"] == before


def test_the_transformer_sees_the_fixed_width_at_every_step(sides):
    seen: list[tuple[int, list[int]]] = []
    handle = sides.pipeline.transformer.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append((kwargs["encoder_hidden_states"].shape[1], list(kwargs["txt_seq_lens"]))),
        with_kwargs=True,
    )
    try:
        trajectories = sides.generate([request for request in sides.mixed() if not request.spec.guided])
    finally:
        handle.remove()
    assert seen and all(width == 32 and set(lengths) == {32} for width, lengths in seen)
    assert {int(t.prompt_embeds_mask.sum()) for t in trajectories} != {32}, "the prompts are shorter than the width"


def test_a_weight_update_changes_outputs_and_restoring_restores_them(sides, all_equal):
    before = sides.generate(sides.mixed())
    sides.disturb()
    sides.sync()
    changed = sides.generate(sides.mixed())
    assert all_equal(sides.score(changed), rollout_log_probs(changed))
    assert not any(torch.equal(a.latents, b.latents) for a, b in zip(before, changed, strict=True))
    assert {t.policy_version for t in changed} == {sides.version}
    sides.restore()
    after = sides.generate(sides.mixed())
    assert all(torch.equal(a.latents, b.latents) for a, b in zip(before, after, strict=True))


def test_an_update_waits_for_the_trajectories_in_flight(sides, all_equal):
    requests = sides.mixed()
    version = sides.version
    stream = sides.engine.generate(requests)
    trajectories = [next(stream)]
    old_weights = {name: value.clone() for name, value in sides.policy.state_dict().items()}
    sides.disturb()
    sides.sync()
    trajectories += list(stream)
    assert len(trajectories) == len(requests)
    assert {t.policy_version for t in trajectories} == {version}
    sides.policy.load_state_dict(old_weights)
    assert all_equal(sides.score(trajectories), rollout_log_probs(trajectories))
    sides.restore()


def test_one_request_that_fails_leaves_the_others_alone(sides, all_equal):
    good = sides.mixed()
    bad = sides.request(99, "a cat and a dog " * 20)  # past collate, straight to the engine
    failures = []
    finished = list(sides.engine.generate([*good[:3], bad, *good[3:]], on_error=lambda r, e: failures.append((r, e))))
    assert len(finished) == len(good)
    assert [request.request_id for request, _ in failures] == [bad.request_id]
    assert "fixed width is 32" in str(failures[0][1])
    with pytest.raises(ExceptionGroup, match="1 of 1"):
        list(sides.engine.generate([sides.request(98, "a cat and a dog " * 20)]))


@pytest.mark.parametrize("sde_type, noise_level", [("sde", 0.7), ("cps", 0.8), ("dance_sde", 0.3)])
def test_every_kind_of_step(sides, all_equal, sde_type, noise_level):
    requests = [sides.request(i, "a cat", sde_type=sde_type, noise_level=noise_level, step_indices=(1, 2, 3)) for i in range(3)]
    trajectories = sides.generate(requests)
    assert [len(t.log_probs) for t in trajectories] == [3, 3, 3]
    assert all_equal(sides.score(trajectories), rollout_log_probs(trajectories))


def test_ode_is_deterministic_sampling_without_log_probs(sides):
    first, second = sides.generate([sides.request(5, "a cat", sde_type="ode"), sides.request(6, "a cat", noise_level=0.0)])
    assert first.log_probs.numel() == second.log_probs.numel() == 0
    assert first.spec.step_indices == ()


def test_different_sizes_submitted_together(sides, all_equal):
    requests = [sides.request(i, "a cat", height=32 + 32 * (i % 2), width=64) for i in range(4)]
    trajectories = sides.generate(requests)
    assert [t.image.shape for t in trajectories] == [(r.spec.height, 64, 3) for r in requests]
    assert all_equal(sides.score(trajectories), rollout_log_probs(trajectories))


def test_exact_with_lora_after_an_update(sides, all_equal):
    from omni_rollout.models.qwen_image.policy import load_policy

    full, sides.policy = sides.policy, load_policy(sides.checkpoint, sides.dtype)
    try:
        parameters = attach_lora(sides.policy, rank=4, alpha=None, seed=0)
        sides.sync()
        before = sides.generate(sides.mixed())
        with torch.no_grad():
            for parameter in parameters:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(7)))
        sides.sync()
        after = sides.generate(sides.mixed())
        assert not torch.equal(before[0].latents, after[0].latents)
        assert all_equal(sides.score(after), rollout_log_probs(after))
    finally:
        sides.policy = full
        sides.restore()
