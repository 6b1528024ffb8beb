"""Images are decoded beside the loop in batches of constant size: which others are in a batch changes no bit of one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from omni_rollout.models.base.sizes import DECODE_ROWS, decode_rows
from omni_rollout.models.qwen_image.spec import layout
from omni_rollout.rollout.decoding import DecodeError


def sizes(sides: Any, count: int, **sampling: Any) -> list[Any]:
    return [sides.request(seed, "a cat", num_inference_steps=2 + seed % 3, **sampling) for seed in range(count)]


def images(sides: Any, requests: list[Any]) -> dict[int, np.ndarray]:
    return {trajectory.seed: trajectory.image for trajectory in sides.engine.generate(requests)}


@pytest.fixture
def calls(sides: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of every call of the VAE."""
    rows: list[int] = []
    decode = sides.pipeline.vae.decode

    def counted(latents: Any, **options: Any) -> Any:
        rows.append(latents.shape[0])
        return decode(latents, **options)

    monkeypatch.setattr(sides.pipeline.vae, "decode", counted)
    return rows


def test_an_image_is_the_same_in_any_company(sides: Any, calls: list[int]) -> None:
    together = images(sides, sizes(sides, 9))
    assert calls == [DECODE_ROWS] * 3, "two full batches, and one filled up"
    for seed in (0, 4, 8):
        (alone,) = (t.image for t in sides.engine.generate([sizes(sides, 9)[seed]]))
        assert np.array_equal(alone, together[seed]), seed
    del calls[:]
    mixed = images(sides, [*sizes(sides, 3), sides.request(9, "dog", height=32, width=32)])
    assert calls == [DECODE_ROWS] * 2 and mixed[9].shape == (32, 32, 3)
    assert all(np.array_equal(mixed[seed], together[seed]) for seed in range(3))


def test_how_many_at_a_time_is_a_matter_of_the_size_alone(sides: Any) -> None:
    spec = [sides.request(0, "a", height=side, width=side).spec for side in (64, 256, 512, 1328)]
    assert [decode_rows(layout(one)) for one in spec] == [4, 4, 1, 1]


def test_latents_that_cannot_be_decoded_are_named_and_the_rest_goes_on(sides: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    decode = sides.pipeline.decode

    def broken(latents: Any, spec: Any) -> Any:
        if spec.height == 32:
            raise MemoryError("too large")
        return decode(latents, spec)

    monkeypatch.setattr(sides.pipeline, "decode", broken)
    small = sides.request(5, "a cat", height=32, width=32)
    told: list[tuple[str, Exception]] = []
    done = sides.engine.generate(
        [small, *sizes(sides, 2)], on_error=lambda request, error: told.append((request.request_id, error))
    )
    assert {trajectory.seed for trajectory in done} == {0, 1}
    ((name, error),) = told
    assert name == small.request_id and isinstance(error, DecodeError) and isinstance(error.__cause__, MemoryError)
