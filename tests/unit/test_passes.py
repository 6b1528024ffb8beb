"""Which pairs of trajectory and step share a pass: within so many pairs, and so many tokens."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from omni_rollout.models.base.passes import PassLimit, tokens_of_a_step
from omni_rollout.models.qwen_image.spec import resolve
from omni_rollout.policy.recompute import Pair, micro_batches
from omni_rollout.types import SamplingSpec


def spec(pixels: int = 64, scale: float = 1.0) -> SamplingSpec:
    return resolve({"height": pixels, "width": pixels, "true_cfg_scale": scale, "prompt_width": 24, "negative_prompt_width": 8})


def test_tokens_of_a_step_are_those_of_image_and_text_in_every_branch():
    assert tokens_of_a_step(spec()) == 16 + 24
    assert tokens_of_a_step(spec(scale=4.0)) == 16 + 24 + 16 + 8
    assert tokens_of_a_step(spec(pixels=512)) == 1024 + 24


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        (PassLimit(16), 16),
        (PassLimit(16, tokens=40 * 5), 5),
        (PassLimit(16, tokens=40 * 5 + 39), 5),
        (PassLimit(3, tokens=40 * 5), 3),
        (PassLimit(16, tokens=1), 1),
        (PassLimit(16, tokens=40 * 5, together=2), 4),
        (PassLimit(1, tokens=1, together=2), 2),
    ],
)
def test_the_fewer_of_both_limits_and_never_none(limit, expected):
    assert limit.holds(spec()) == expected


@settings(max_examples=100, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.sampled_from([32, 64, 96]), st.sampled_from([1.0, 4.0])), min_size=1, max_size=12),
    steps=st.integers(1, 5),
    pairs=st.integers(1, 9),
    tokens=st.one_of(st.none(), st.integers(1, 400)),
)
def test_every_pair_is_in_one_pass_that_is_within_the_limits(sizes, steps, pairs, tokens):
    specs = [spec(*size) for size in sizes]
    trajectories = cast(Any, [SimpleNamespace(spec=one) for one in specs])
    keys = [[size] * steps for size in sizes]
    given_pairs = [Pair(row, index) for row in range(len(sizes)) for index in range(steps)]
    batches = list(micro_batches(trajectories, keys, given_pairs, PassLimit(pairs, tokens)))
    assert Counter(pair for batch in batches for pair in batch) == Counter(given_pairs)
    for batch in batches:
        assert len({sizes[pair.row] for pair in batch}) == 1
        cost = len(batch) * tokens_of_a_step(specs[batch[0].row])
        assert len(batch) <= pairs and (len(batch) == 1 or tokens is None or cost <= tokens)
    of_sizes = Counter(sizes[batch[0].row] for batch in batches)
    for size, count in of_sizes.items():
        held = PassLimit(pairs, tokens).holds(spec(*size))
        assert count == -(-steps * sizes.count(size) // held), "no pass is less full than it could be"
