"""Images are decoded beside the loop in batches of constant size: which others are in a batch changes no bit of one."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLQwenImage

from omni_rollout.models.base.channel_norms import NORMS, ByPlanes
from omni_rollout.models.base.sizes import DECODE_ROWS, decode_rows, is_small
from omni_rollout.models.qwen_image.decoder import install_frame_convs
from omni_rollout.models.qwen_image.spec import layout
from omni_rollout.rollout.decoding import DecodeError, Decoder
from omni_rollout.run.profile import Stages


def sizes(sides: Any, count: int, **sampling: Any) -> list[Any]:
    return [sides.request(seed, "a cat", num_inference_steps=2 + seed % 3, **sampling) for seed in range(count)]


def images(sides: Any, requests: list[Any]) -> dict[int, np.ndarray]:
    return {trajectory.seed: trajectory.image for trajectory in sides.engine.generate(requests)}


@pytest.fixture
def calls(sides: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of every call of the VAE."""
    rows: list[int] = []
    decode = type(sides.pipeline.vae).decode

    def counted(vae: Any, latents: Any, **options: Any) -> Any:
        rows.append(latents.shape[0])
        return decode(vae, latents, **options)

    monkeypatch.setattr(type(sides.pipeline.vae), "decode", counted)
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


def test_the_norms_of_its_vae_are_added_by_planes(sides: Any) -> None:
    norms = [layer for layer in sides.pipeline.vae.modules() if type(layer).__name__.startswith(NORMS)]
    assert norms and all(isinstance(norm, ByPlanes) for norm in norms)


def test_one_frame_is_decoded_as_by_the_vae_itself_but_for_rounding(sides: Any) -> None:
    own = AutoencoderKLQwenImage.from_pretrained(sides.checkpoint, subfolder="vae").to(sides.pipeline.vae.dtype)
    latents = torch.randn(DECODE_ROWS, 16, 1, 8, 6, generator=torch.Generator().manual_seed(0)).to(own.dtype)
    exact = own.dtype == torch.float32
    with torch.no_grad():
        expected = own.decode(latents).sample
        found = sides.pipeline.vae.decode(latents, return_dict=False)[0]
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-5 if exact else 0.1)
        install_frame_convs(own.decoder)
        assert torch.equal(own.decode(latents).sample, found)
        video = torch.cat([latents, latents.flip(0)], dim=2)
        frames = own.decode(video).sample  # with a past, it is what it was
        own_again = AutoencoderKLQwenImage.from_pretrained(sides.checkpoint, subfolder="vae").to(own.dtype)
        torch.testing.assert_close(frames, own_again.decode(video).sample, rtol=0, atol=2e-5 if exact else 0.1)


def test_what_has_finished_is_decoded_where_the_engine_ends(sides: Any) -> None:
    """Of two sizes; that the first batch cannot be decoded does not keep the second from it."""
    small = [sides.request(seed, "a cat", height=32, width=32) for seed in range(2)]
    large = sizes(sides, 2)

    def decode(latents: Any, spec: Any) -> torch.Tensor:
        if spec.height == 32:
            raise MemoryError("too large")
        return torch.zeros(len(latents), 64, 64, 3, dtype=torch.uint8)

    loop, told = asyncio.new_event_loop(), []
    decoder = Decoder(decode, lambda request, record, media: told.append((request, media)), loop)
    for request in (*small, *large):
        decoder.expect(request)
    for request in (small[0], large[0]):  # the others of their sizes never come
        decoder.add(request, {"final_latents": torch.zeros(1, 16, 64)})
    assert not decoder.busy
    decoder.finish()
    (broken, error), (whole, media) = told
    assert broken is small[0] and isinstance(error, DecodeError) and isinstance(error.__cause__, MemoryError)
    assert whole is large[0] and media.shape == (64, 64, 3) and not decoder.busy
    decoder.close()
    loop.close()


def test_batches_beside_each_other_are_handed_over_in_their_order_each_by_one_thread_large_ones_by_all(sides: Any) -> None:
    """Two of small images wait for each other, so they are beside each other; the second is done first."""
    meeting, threads, told = threading.Barrier(2), [], []
    second_done = threading.Event()

    def decode(latents: Any, spec: Any) -> torch.Tensor:
        threads.append((spec.height, torch.get_num_threads()))
        if spec.height < 1024:
            meeting.wait(20)
            if latents[0, 0, 0] == 0:
                assert second_done.wait(20)
            else:
                second_done.set()
        return torch.full((len(latents), 1), int(latents[0, 0, 0]), dtype=torch.uint8)

    loop = asyncio.new_event_loop()
    decoder = Decoder(decode, lambda request, record, media: told.append((request.spec.height, int(media[0]))), loop, threads=2)
    small = [sides.request(seed, "a cat") for seed in range(2 * DECODE_ROWS)]
    large = [sides.request(seed, "a cat", height=1024, width=1024) for seed in range(2)]
    for request in (*small, *large):
        decoder.expect(request)
    for place, request in enumerate((*small, *large)):
        decoder.add(request, {"final_latents": torch.full((1, 16, 64), float(place // DECODE_ROWS))})
    assert len(decoder.busy) == 4
    decoder.finish()
    decoder.close()
    loop.close()
    assert told == [(64, 0)] * DECODE_ROWS + [(64, 1)] * DECODE_ROWS + [(1024, 2)] * 2
    assert sorted(threads) == [(64, 1), (64, 1), (1024, 2), (1024, 2)]


@pytest.mark.parametrize("number", [1, 2, 3])
def test_small_images_do_not_depend_on_the_number_of_threads(sides: Any, number: int) -> None:
    latents = torch.randn(DECODE_ROWS, 16, 64, generator=torch.Generator().manual_seed(number))
    batch = [(sides.request(seed, "a cat"), {"final_latents": latents[seed : seed + 1]}) for seed in range(DECODE_ROWS)]
    decoder = Decoder(sides.pipeline.decode_beside_the_loop, lambda *told: None, asyncio.new_event_loop(), number)
    with ThreadPoolExecutor(1) as pool:  # a thread whose own number is not ours
        found = pool.submit(decoder._media, batch).result()
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.inference_mode():
        expected = sides.pipeline.decode(latents, batch[0][0].spec)
    torch.set_num_threads(before)
    assert np.array_equal(found, expected.numpy())


def test_how_many_at_a_time_is_a_matter_of_the_size_alone(sides: Any) -> None:
    spec = [sides.request(0, "a", height=side, width=side).spec for side in (64, 128, 256, 512, 1328)]
    assert [decode_rows(layout(one)) for one in spec] == [4, 4, 2, 1, 1]
    assert [is_small(layout(one)) for one in spec] == [True, True, True, True, False]


def test_latents_that_cannot_be_decoded_are_named_and_the_rest_goes_on(sides: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    decode = type(sides.pipeline).decode

    def broken(pipeline: Any, latents: Any, spec: Any) -> Any:
        if spec.height == 32:
            raise MemoryError("too large")
        return decode(pipeline, latents, spec)

    monkeypatch.setattr(type(sides.pipeline), "decode", broken)
    small = sides.request(5, "a cat", height=32, width=32)
    told: list[tuple[str, Exception]] = []
    done = sides.engine.generate(
        [small, *sizes(sides, 2)], on_error=lambda request, error: told.append((request.request_id, error))
    )
    assert {trajectory.seed for trajectory in done} == {0, 1}
    ((name, error),) = told
    assert name == small.request_id and isinstance(error, DecodeError) and isinstance(error.__cause__, MemoryError)


def test_what_an_instrument_puts_in_the_place_of_decode_is_not_called(sides: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is bound to the one VAE, whose memory two threads would share; decodings are timed where each has its own."""
    expected = images(sides, sizes(sides, 8))
    monkeypatch.setattr(sides.pipeline, "decode", lambda latents, spec: pytest.fail("the engine's own VAE"))
    stages = Stages()
    with stages.of_engine(sides.engine):
        found = images(sides, sizes(sides, 8))
    assert stages.spent["decode"].calls == 2
    assert all(np.array_equal(found[seed], image) for seed, image in expected.items())
