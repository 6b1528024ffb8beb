"""Flow-GRPO's advantages and loss against plain Python loops, and against verl's own loss."""

from __future__ import annotations

import importlib.util
import math
import random
import statistics
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from omni_rollout.algorithms.base import Loss, Steps
from omni_rollout.algorithms.flow_grpo import FlowGRPO

FINITE = st.floats(-100, 100, width=32)
GROUPED = st.lists(st.tuples(st.sampled_from("abcd"), FINITE), min_size=1, max_size=24)


def by_hand(rows: list[tuple[str, float]], std: str, clip: float) -> list[float]:
    result = []
    for group, reward in rows:
        own = [other for name, other in rows if name == group]
        if len(set(own)) == 1:
            result.append(0.0)
            continue
        spread = statistics.pstdev(own if std == "group" else [other for _, other in rows])
        result.append(max(-clip, min(clip, (reward - statistics.fmean(own)) / (spread + 1e-4))))
    return result


@settings(deadline=None, max_examples=150)
@given(rows=GROUPED, std=st.sampled_from(["global", "group"]), clip=st.floats(0.1, 10))
def test_advantages_are_those_worked_out_by_hand(rows: list[tuple[str, float]], std: str, clip: float) -> None:
    rewards = torch.tensor([reward for _, reward in rows])
    result = FlowGRPO(advantage_std=std, advantage_clip=clip).advantages(rewards, [group for group, _ in rows])
    assert result.dtype == torch.float32
    assert result.tolist() == pytest.approx(by_hand(rows, std, clip), rel=1e-5, abs=1e-5)


@settings(deadline=None, max_examples=100)
@given(rows=GROUPED, std=st.sampled_from(["global", "group"]), seed=st.integers(0, 99))
def test_the_order_of_images_does_not_matter(rows: list[tuple[str, float]], std: str, seed: int) -> None:
    shuffled = random.Random(seed).sample(range(len(rows)), len(rows))
    there = FlowGRPO(advantage_std=std).advantages(torch.tensor([r for _, r in rows]), [g for g, _ in rows])
    moved = [rows[index] for index in shuffled]
    back = FlowGRPO(advantage_std=std).advantages(torch.tensor([r for _, r in moved]), [g for g, _ in moved])
    torch.testing.assert_close(back, there[shuffled], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("std", ["global", "group"])
@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_groups_of_one_and_of_equal_rewards_get_exact_zeros(std: str, size: int) -> None:
    rewards = torch.tensor([0.1] * size + [0.0, 1.0], dtype=torch.float64)  # three times 0.1, by three, is not 0.1
    result = FlowGRPO(advantage_std=std).advantages(rewards, ["same"] * size + ["other"] * 2)
    assert torch.equal(result[:size], torch.zeros(size))
    assert float(result[-1]) > 0.9 and float(result[-1]) == -float(result[-2])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"group_ids": ["a"]}, "2.* rewards for 1 group ids"),
        ({"rewards": torch.tensor([1.0, math.nan])}, "group b are not finite"),
    ],
)
def test_what_cannot_be_an_advantage_is_refused(values: dict[str, object], message: str) -> None:
    given_: dict[str, object] = {"rewards": torch.tensor([1.0, 2.0]), "group_ids": ["a", "b"], **values}
    with pytest.raises(ValueError, match=message):
        FlowGRPO().advantages(**given_)  # type: ignore[arg-type]


def loss(
    log_probs: torch.Tensor,
    old: torch.Tensor,
    advantages: torch.Tensor,
    clip_range: float,
    kl: torch.Tensor | None = None,
    kl_coef: float = 0.0,
) -> Loss:
    none: Any = None  # Flow-GRPO asks for nothing else
    others = dict.fromkeys(("mean", "velocity", "sample", "prev_sample", "step_std", "sigma", "sigma_next"), none)
    steps = Steps(log_probs=log_probs, old_log_probs=old, advantages=advantages, clip_range=clip_range, kl=kl, **others)
    return FlowGRPO(kl_coef=kl_coef).loss(steps)


ROWS = st.lists(st.tuples(st.floats(-0.5, 0.5, width=32), st.floats(-5, 5, width=32), st.floats(0, 1, width=32)), min_size=1)


@settings(deadline=None, max_examples=150)
@given(rows=ROWS, clip_range=st.sampled_from([1e-4, 1e-2, 0.2]), kl_coef=st.sampled_from([0.0, 0.5]))
def test_loss_and_gradient_are_those_worked_out_by_hand(
    rows: list[tuple[float, float, float]], clip_range: float, kl_coef: float
) -> None:
    old = torch.tensor([-1.2] * len(rows))
    log_probs = (old + torch.tensor([row[0] for row in rows])).requires_grad_()
    advantages, kl = (torch.tensor([row[index] for row in rows]) for index in (1, 2))
    result = loss(log_probs, old, advantages, clip_range, kl=kl, kl_coef=kl_coef)
    result.loss.backward()
    losses, gradients = [], []
    for index in range(len(rows)):
        ratio = math.exp(float(log_probs.detach()[index] - old[index]))
        high, low, advantage = 1 + clip_range, 1 - clip_range, float(advantages[index])
        if min(abs(ratio - high), abs(ratio - low)) < 1e-6:
            return  # on the edge, fp32 and fp64 may fall on different sides
        losses.append(-min(ratio * advantage, min(max(ratio, low), high) * advantage))
        stopped = (ratio > high and advantage > 0) or (ratio < low and advantage < 0)
        gradients.append(0.0 if stopped else -ratio * advantage / len(rows))
    assert float(result.loss.detach()) == pytest.approx(
        statistics.fmean(losses) + kl_coef * statistics.fmean(row[2] for row in rows), rel=1e-5, abs=1e-6
    )
    assert log_probs.grad is not None
    assert log_probs.grad.tolist() == pytest.approx(gradients, rel=1e-4, abs=1e-6)


def test_equal_log_probs_give_a_ratio_of_exactly_one() -> None:
    old = torch.randn(64)
    advantages = torch.randn(64)
    log_probs = old.clone().requires_grad_()
    result = loss(log_probs, old, advantages, 1e-6)
    result.loss.backward()
    assert float(result.loss.detach()) == float(-advantages.double().mean().float())
    assert log_probs.grad is not None
    torch.testing.assert_close(log_probs.grad, -advantages / 64, rtol=1e-6, atol=0)  # -A grad log_prob, and none is clipped


def test_the_loss_does_not_depend_on_the_order() -> None:
    generator = torch.Generator().manual_seed(0)
    log_probs, old, advantages = (torch.randn(1000, generator=generator) for _ in range(3))
    order = torch.randperm(1000, generator=generator)
    one = loss(log_probs, old, advantages, 0.2).loss
    assert torch.equal(one, loss(log_probs[order], old[order], advantages[order], 0.2).loss)


@pytest.mark.skipif(importlib.util.find_spec("verl") is None, reason="verl is not installed")
def test_loss_is_that_of_verl() -> None:
    from verl.trainer.ppo.core_algos import compute_policy_loss_vanilla
    from verl.workers.config import ActorConfig

    config = ActorConfig(
        strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, clip_ratio=0.1, clip_ratio_low=0.1, clip_ratio_high=0.1
    )
    generator = torch.Generator().manual_seed(0)
    old, advantages = torch.randn(200, generator=generator), torch.randn(200, generator=generator)
    moved = old + 0.2 * torch.randn(200, generator=generator)
    gradients, values = [], []
    for name in ("own", "verl"):
        log_probs = moved.clone().requires_grad_()
        if name == "own":
            found = loss(log_probs, old, advantages, 0.1).loss
        else:
            mask = torch.ones(200, 1)
            found, _ = compute_policy_loss_vanilla(old[:, None], log_probs[:, None], advantages[:, None], mask, config=config)
        found.backward()
        values.append(float(found.detach()))
        gradients.append(log_probs.grad)
    assert values[0] == pytest.approx(values[1], rel=1e-5)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-5, atol=1e-8)
    assert 0 < int((gradients[0] == 0).sum()) < 200
