"""One request keeps its bits in any company, and after a restart; and a trajectory that cannot be honoured is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from omni_rollout.policy.recompute import FingerprintError, check_fingerprint
from omni_rollout.rollout import engine as engine_module
from omni_rollout.rollout.engine import EngineDiedError, RolloutEngine
from omni_rollout.types import RequestError
from tests.parity.conftest import PROMPTS, Sides


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_with_one_to_fifteen_others_and_after_a_restart(checkpoint, dtype):
    sides = object.__new__(Sides)
    sides._count = 0

    def company(others: int) -> list:
        texts = [sides.request(100 + i, PROMPTS[i % 4], true_cfg_scale=[1.0, 3.0][i % 2]) for i in range(others)]
        return [*texts[::2], sides.request(7, PROMPTS[1], true_cfg_scale=3.0), *texts[1::2]]

    found = []
    for _ in range(2):  # the second engine is a restart
        with RolloutEngine(checkpoint, dtype=dtype, max_num_seqs=16) as engine:
            for others in (0, 1, 2, 7, 15):
                (mine,) = (t for t in engine.generate(company(others)) if t.seed == 7)
                found.append(mine)
            assert max(mine.fingerprint["batch_sizes"]) > 4, "it shared its passes"
    for other in found[1:]:
        assert torch.equal(found[0].latents, other.latents)
        assert torch.equal(found[0].log_probs, other.log_probs)
        assert (found[0].image == other.image).all()
        assert found[0].fingerprint["initial_noise"] == other.fingerprint["initial_noise"]


def test_an_engine_whose_thread_has_ended_says_so(checkpoint, monkeypatch):
    monkeypatch.setattr(engine_module, "LIVENESS_SECONDS", 0.2)
    sides = object.__new__(Sides)
    sides._count = 0
    with RolloutEngine(checkpoint) as engine:
        assert len(list(engine.generate([sides.request(1, "a cat")]))) == 1
        engine._engine.stop_event.set()
        engine._engine.worker_thread.join()
        with pytest.raises(EngineDiedError, match="make a new RolloutEngine"):
            list(engine.generate([sides.request(2, "a cat")]))


def test_a_trajectory_that_cannot_be_honoured_is_refused_naming_the_field(sides):
    (trajectory,) = sides.generate([sides.request(1, "a cat")])
    expected = {"dtype": sides.engine.dtype, "parity": "exact", "weights": sides.engine.weights_digest}
    check_fingerprint(trajectory, expected)
    for field, other in (("dtype", "float16"), ("parity", "fast"), ("weights", "0" * 64)):
        changed = replace(trajectory, fingerprint={**trajectory.fingerprint, field: other})
        with pytest.raises(FingerprintError, match=f"sampled with {field}="):
            check_fingerprint(changed, expected)


def test_the_same_requests_again_and_again(sides):
    requests = sides.mixed()[:3]
    first, second, third = (sides.generate(requests) for _ in range(3))
    for one, two, three in zip(first, second, third, strict=True):
        assert torch.equal(one.latents, two.latents) and torch.equal(one.latents, three.latents)
        assert one.request_id == two.request_id


def test_one_id_twice_in_a_call_is_refused_before_anything_is_sampled(sides):
    request = sides.request(1, "a cat")
    with pytest.raises(RequestError, match="given twice"):
        list(sides.engine.generate([request, request]))
    assert len(sides.generate([request])) == 1
