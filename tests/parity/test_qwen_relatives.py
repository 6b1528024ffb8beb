"""Qwen-Image's relatives with input images: what the engine computed is what the trainer computes, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from omni_rollout.models.base import encodings
from omni_rollout.models.base.channel_norms import NORMS, ByPlanes
from omni_rollout.models.base.images import made_image
from omni_rollout.policy.lora import attach_lora
from omni_rollout.trajectories.capsule import load_capsule, save_capsule
from tests.parity.relatives import FAMILIES, KINDS, Relative

CASES = [(family, dtype) for family in FAMILIES for dtype in ("float32", "bfloat16")]


@pytest.fixture(scope="module", params=CASES, ids=["-".join(case) for case in CASES])
def one(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Relative]:
    family, dtype = request.param
    relative = Relative(family, dtype, tmp_path_factory.mktemp(family))
    yield relative
    relative.engine.close()


@pytest.mark.parametrize("micro_batch_size", [1, 3, 16])
def test_log_probs_are_equal_whatever_the_micro_batch(one: Relative, micro_batch_size: int) -> None:
    trajectories = one.generate(one.mixed())
    assert all(one.equal(trajectories, micro_batch_size)) and len(trajectories) == 8
    sizes = [size for trajectory in trajectories for size in trajectory.fingerprint["batch_sizes"]]
    assert max(sizes) > 1, "nothing was batched, so nothing was shown about batches"
    for trajectory in trajectories:
        assert trajectory.media.shape == one.spec.layout(trajectory.spec).media and np.ptp(trajectory.media) > 0
        assert {tensor.dtype for tensor in trajectory.conditions.values()} == {one.dtype}


def test_the_comparison_can_fail(one: Relative) -> None:
    trajectories = one.generate(one.mixed())
    other = one.load_policy()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1e-3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    assert not any(one.equal(trajectories, policy=other))


def test_alone_or_in_company_the_bits_are_the_same(one: Relative) -> None:
    together = one.generate(one.mixed())
    alone = [next(one.engine.generate([request])) for request in one.mixed()]
    for ours, theirs in zip(together, alone, strict=True):
        assert torch.equal(ours.latents, theirs.latents) and torch.equal(ours.log_probs, theirs.log_probs)
        assert (ours.media == theirs.media).all()


def test_a_capsule_comes_back_and_is_scored_as_before(one: Relative, tmp_path: Path) -> None:
    trajectories = one.generate(one.mixed())
    read = []
    for before in trajectories:
        save_capsule(before, tmp_path / f"{before.seed}.safetensors")
        read.append(load_capsule(tmp_path / f"{before.seed}.safetensors"))
    for before, after in zip(trajectories, read, strict=True):
        assert after.spec == before.spec and after.prompt == before.prompt and (after.media == before.media).all()
        assert all(torch.equal(after.conditions[name], tensor) for name, tensor in before.conditions.items())
    assert all(one.equal(read))


def test_exact_with_lora_after_an_update(one: Relative) -> None:
    adapted = one.load_policy()
    factors = attach_lora(adapted, rank=4, seed=0)
    before = one.generate(one.mixed())
    with torch.no_grad():
        for factor in factors:
            factor.add_(0.05 * torch.randn(factor.shape, generator=torch.Generator().manual_seed(7)))
    try:
        one.sync(adapted)
        after = one.generate(one.mixed())
        assert not any(torch.equal(a.latents, b.latents) for a, b in zip(before, after, strict=True))
        assert all(one.equal(after, policy=adapted)) and not any(one.equal(after))
    finally:
        one.sync(one.policy)


def test_the_norms_of_its_vae_are_added_by_planes(one: Relative) -> None:
    norms = [layer for layer in one.engine.pipeline.vae.modules() if type(layer).__name__.startswith(NORMS)]
    assert norms and all(isinstance(norm, ByPlanes) for norm in norms)


def test_a_group_is_encoded_once(one: Relative) -> None:
    """Each picture by the VAE, each text of a guided group by the text encoder."""
    counts = {"vae": 0, "text": 0}
    pipeline = one.engine.pipeline
    encode, forward = pipeline.vae.encode, pipeline.text_encoder.forward

    def counted(what: str, function):
        def call(*args, **kwargs):
            counts[what] += 1
            return function(*args, **kwargs)

        return call

    sampling, images = KINDS[one.family](1)
    fresh = [made_image(900, image.height, image.width) for image in images]  # no other test's
    group = [one.request(50, fresh, member, true_cfg_scale=4.0, **sampling) for member in range(6)]
    pipeline.vae.encode, pipeline.text_encoder.forward = counted("vae", encode), counted("text", forward)
    try:
        trajectories = one.generate(group)
        first = dict(counts)
        one.generate([one.request(50, [made_image(901, 64, 64), *fresh[1:]], 9, true_cfg_scale=4.0, **sampling)])
    finally:
        pipeline.vae.encode, pipeline.text_encoder.forward = encode, forward
    assert first["vae"] == len(fresh) and first["text"] <= 2
    assert counts["vae"] == 2 * len(fresh), "another picture is another encoding"
    assert all(one.equal(trajectories))
    assert len({trajectory.latents[0].numpy().tobytes() for trajectory in trajectories}) == len(group)


def test_what_is_kept_is_bounded(one: Relative) -> None:
    one.generate(one.mixed())
    kept = one.engine.pipeline.encodings
    assert isinstance(kept, encodings.Encodings) and 0 < len(kept._kept) <= 2 * 5


def test_an_input_image_that_changed_since_is_refused_by_name(one: Relative, tmp_path: Path) -> None:
    from PIL import Image

    from omni_rollout.models.base.images import describe

    sampling, images = KINDS[one.family](0)
    Image.new("RGB", (64, 64), "red").save(tmp_path / "a.png")
    described = describe(tmp_path / "a.png")
    Image.new("RGB", (64, 64), "blue").save(tmp_path / "a.png")
    with pytest.raises(ExceptionGroup) as failure:
        one.generate([one.request(60, [described, *images[1:]], **sampling)])
    assert "its sha256 differs" in str(failure.value.exceptions[0])
    assert all(one.equal(one.generate(one.mixed()[:2])))
