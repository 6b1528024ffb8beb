"""The cases of `benchmarks.why_parity` are what they say, and measuring a gradient moves nothing."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.why_parity import PUBLISHED, Gradients, cases, plot, table
from omni_rollout.config import TrainerConfig
from omni_rollout.trajectories.capsule import load_capsule
from tests.parity.test_golden import CAPSULE

LEARNER: Any = SimpleNamespace(policy=nn.Linear(1, 1), dtype=None, config=SimpleNamespace(model=SimpleNamespace(family="")))


def test_the_published_gap_is_of_the_size_that_is_published_and_the_same_every_time() -> None:
    exact, *rules, published = cases()
    assert (exact.name, [rule.name for rule in rules], published.name) == ("exact", ["timestep_cast", "rope"], "published")
    one = load_capsule(CAPSULE)
    gaps = []
    for number in range(2000):
        trajectory = replace(one, group_id=f"g{number}")
        with exact.broken(LEARNER, [trajectory]) as told:
            assert told[0] is trajectory
        with published.broken(LEARNER, [trajectory]) as told, published.broken(LEARNER, [trajectory]) as again:
            assert torch.equal(told[0].log_probs, again[0].log_probs)
            gaps.append((told[0].log_probs - trajectory.log_probs).abs().mean())
    assert float(torch.stack(gaps).mean()) == pytest.approx(PUBLISHED, rel=0.05)


def test_a_gradient_is_kept_and_nothing_is_moved() -> None:
    policy = nn.Linear(3, 2)
    before = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
    engine = Gradients(TrainerConfig(), policy, list(policy.parameters()))
    engine.backward(policy(torch.ones(1, 3)).sum(), last=True)
    engine.step(1.0)
    assert torch.equal(engine.last, torch.ones(8)) and policy.weight.grad is None
    assert all(torch.equal(tensor, before[name]) for name, tensor in policy.state_dict().items())


def test_the_table_has_a_line_for_each_case_and_clip_range() -> None:
    rows = [{"clip_range": 1e-4, "case": "rope", "cosine": value} for value in (0.5, 0.75)]
    assert list(table(rows, ["cosine"])) == [
        "| clip range | trainer | cosine |",
        "|---|---|---|",
        "| 0.0001 | rope | 0.5 to 0.75 |",
    ]


def test_a_plot_has_the_exact_runs_beside_those_of_its_range() -> None:
    rows = [
        {"case": case, "clip_range": clip, "seed": seed, "rewards": [0.5 + 0.01 * seed + step / 100 for step in range(16)]}
        for case, clip in (("exact", 1e-3), ("rope", 1e-3), ("rope", 1e-5))
        for seed in (0, 1)
    ]
    narrow = plot(rows, 1e-5)
    assert ">exact<" in narrow and ">rope<" in narrow and "clip range 1e-05" in narrow
    assert narrow.count("<polyline") == 2 and narrow.count("<polygon") == 2
    assert plot(rows[:2], 1e-5).count("<polyline") == 1
