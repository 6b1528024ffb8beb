"""What Wan2.2's parameters mean: resolved once and for good, the boundary between its experts in exact arithmetic."""

from __future__ import annotations

from dataclasses import replace
from decimal import Decimal
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from omni_rollout.models import family_module
from omni_rollout.models.wan2_2 import checkpoint
from omni_rollout.models.wan2_2.spec import boundary_step
from omni_rollout.types import InputImage, RequestError, SamplingSpec

FAMILIES = ("wan2_2", "wan2_2_i2v")
IMAGE = InputImage(path="a.png", sha256="0" * 64, height=300, width=500)


def resolved(family: str = "wan2_2", **values: Any) -> SamplingSpec:
    images = (IMAGE,) if family == "wan2_2_i2v" else ()
    return family_module(family, "spec").resolve({"prompt_width": 512, **values}, images)


def again(spec: SamplingSpec) -> SamplingSpec:
    values = {key: value for key, value in spec.to_json().items() if key != "family"}
    return resolved(spec.family, **{**values, "step_indices": spec.step_indices or None})


@given(
    family=st.sampled_from(FAMILIES),
    steps=st.integers(2, 60),
    scale=st.floats(0, 10),
    extra=st.fixed_dictionaries(
        {},
        optional={
            "frames": st.integers(0, 30).map(lambda latent: 4 * latent + 1),
            "flow_shift": st.floats(0.01, 20) | st.integers(1, 12),
            "boundary_ratio": st.floats(0.001, 0.999),
            "true_cfg_scale_2": st.none() | st.floats(0, 10) | st.integers(0, 5),
        },
    ),
    sde_type=st.sampled_from(["sde", "cps", "ode"]),
)
def test_any_spec_resolves_to_itself(family, steps, scale, extra, sde_type):
    values = {"height": 16 * steps, "width": 32, "num_inference_steps": steps, "true_cfg_scale": scale, "sde_type": sde_type}
    spec = resolved(family, **values, extra=extra)
    assert again(spec) == spec == SamplingSpec.from_json(spec.to_json())
    assert None not in spec.extra.values() and spec.guided == (max(scale, spec.extra["true_cfg_scale_2"]) > 1)


@given(
    steps=st.integers(1, 80),
    shift=st.decimals("0.1", "16", places=2),
    ratio=st.decimals("0.01", "0.99", places=3),
)
def test_the_boundary_against_whole_numbers(steps, shift, ratio):
    """sigma_k = s (N - k) / (N + (s - 1)(N - k)) with s = S / 100, against r = R / 1000, cross-multiplied."""
    s, r = int(shift * 100), int(ratio * 1000)
    first = [k for k in range(steps) if 1000 * s * (steps - k) < r * (100 * steps + (s - 100) * (steps - k))]
    assert boundary_step(steps, float(shift), float(ratio)) == (first[0] if first else steps)


@pytest.mark.parametrize(
    ("steps", "shift", "ratio", "on"), [(10, 3, 0.875, 3), (10, 1, 0.9, 1), (3, 2, 0.8, 1), (40, 9, 0.9, 20)]
)
def test_a_step_on_the_boundary_is_the_first_experts(steps, shift, ratio, on):
    sigma = Decimal(steps - on) / steps
    exactly = Decimal(shift) * sigma / (1 + (Decimal(shift) - 1) * sigma)
    assert abs(exactly - Decimal(str(ratio))) < Decimal("1e-20"), "the example is one"
    assert boundary_step(steps, shift, ratio) == on + 1 == boundary_step(steps, float(shift), ratio)
    spec = resolved(num_inference_steps=steps, extra={"flow_shift": shift, "boundary_ratio": ratio})
    expert = family_module("wan2_2", "spec").expert
    assert [expert(spec, step) for step in range(steps)] == [0] * (on + 1) + [1] * (steps - on - 1)


def test_floats_would_not_agree_there():
    """Why: the same boundary, compared with fp32 timesteps, falls on either side of itself."""
    spec = family_module("wan2_2", "spec")
    found = {}
    for steps, shift, ratio, on in (
        (10, 3.0, 0.875, 3),
        (10, 1.0, 0.9, 1),
        (3, 2.0, 0.8, 1),
        (5, 4.0, 0.8, 2),
        (7, 6.0, 0.9, 2),
    ):
        made = resolved(num_inference_steps=steps, extra={"flow_shift": shift, "boundary_ratio": ratio})
        timesteps = spec.schedule(made, {}).timesteps
        found[steps, shift] = bool(timesteps[on] >= ratio * 1000)
    assert len(set(found.values())) == 2, found


def test_the_schedule_is_shifted_and_in_float():
    spec = family_module("wan2_2", "spec")
    schedule = spec.schedule(resolved(num_inference_steps=10, extra={"flow_shift": 3.0}), {"shift": 7.0})
    linear = torch.linspace(1, 0.1, 10, dtype=torch.float64)
    expected = 3 * linear / (1 + 2 * linear)
    torch.testing.assert_close(schedule.sigmas[:-1].double(), expected, rtol=0, atol=1e-7)
    assert schedule.timesteps.dtype == torch.float32 and schedule.sigmas[-1] == 0
    assert not torch.equal(schedule.timesteps, schedule.timesteps.long().float())


def test_the_second_scale_is_the_firsts_where_it_is_not_given():
    assert resolved(true_cfg_scale=3.0).extra["true_cfg_scale_2"] == 3.0
    assert resolved(cfg_scale=2).extra["true_cfg_scale_2"] == 2.0
    assert resolved().extra["true_cfg_scale_2"] == resolved().true_cfg_scale == 4.0
    zero = resolved(true_cfg_scale=3.0, extra={"true_cfg_scale_2": 0})
    assert zero.extra["true_cfg_scale_2"] == 0.0 and zero.negative_prompt == ""
    second = resolved(true_cfg_scale=1.0, extra={"true_cfg_scale_2": 2.0})
    assert second.guided and not resolved(true_cfg_scale=1.0).guided


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"extra": {"frames": 80}}, "sampling.extra.frames=80: expected 1, 5, 9"),
        ({"extra": {"frames": 0}}, "frames=0"),
        ({"extra": {"frames": 5.0}}, "frames=5.0: expected int"),
        ({"extra": {"frame": 5}}, "did you mean frames"),
        ({"height": 72}, "height=72: expected a multiple of 16 pixels; the nearest is 64"),
        ({"extra": {"flow_shift": 0}}, "flow_shift=0: expected a finite number above 0"),
        ({"extra": {"flow_shift": float("nan")}}, "flow_shift=nan"),
        ({"extra": {"flow_shift": float("inf")}}, "flow_shift=inf"),
        ({"extra": {"boundary_ratio": 1.0}}, "boundary_ratio=1.0: expected a number between 0 and 1"),
        ({"extra": {"true_cfg_scale_2": -1.0}}, "true_cfg_scale_2=-1.0"),
        (
            {"num_inference_steps": 10, "extra": {"flow_shift": 3.0, "boundary_step": 3}},
            "boundary_step=3: 10 steps, .* make it 4",
        ),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(values, message):
    with pytest.raises(RequestError, match=message):
        resolved(**values)


def test_the_layout():
    spec = family_module("wan2_2", "spec")
    layout = spec.layout(resolved(height=480, width=832))
    assert layout.latent == (16, 21, 60, 104) and layout.media == (81, 480, 832, 3) and layout.frames == 81
    assert layout.tokens == 21 * 30 * 52 == 32760 and layout.conditions == {}
    i2v = family_module("wan2_2_i2v", "spec")
    assert i2v.layout(resolved("wan2_2_i2v", height=64, width=32, extra={"frames": 5})).conditions == {
        "condition": (20, 2, 8, 4)
    }


def test_the_size_of_a_video_follows_its_image():
    i2v = family_module("wan2_2_i2v", "spec")
    spec = resolved("wan2_2_i2v")
    assert (spec.height, spec.width) == (480, 816) and spec.true_cfg_scale == 5.0 and spec.extra["boundary_ratio"] == 0.9
    assert resolved("wan2_2_i2v", height=None, width=None) == spec
    with pytest.raises(RequestError, match="height=64, width=None: give both, or neither"):
        resolved("wan2_2_i2v", height=64)
    assert i2v.frame_size(replace(IMAGE, height=100_000, width=1)) == (199840, 16)
    for images, found in (((), 0), ((IMAGE, IMAGE), 2)):
        with pytest.raises(RequestError, match=f"the prompt has {found}, wan2_2_i2v takes 1"):
            i2v.resolve({"prompt_width": 8}, images)
    with pytest.raises(RequestError, match="wan2_2 takes none"):
        family_module("wan2_2", "spec").resolve({"prompt_width": 8}, (IMAGE,))


@pytest.mark.parametrize(
    ("index", "transformer", "extra", "message"),
    [
        ({"expand_timesteps": True}, {}, {}, "TI2V-5B"),
        ({}, {"image_dim": 1280}, {}, "image_dim=1280, so it is Wan2.1's image to video"),
        ({}, {"attention_head_dim": 40}, {}, "attention_head_dim=40, .* expected 32 or 36 or 38 or 42 or 44 or 48"),
        ({}, {"in_channels": 36}, {}, "reads 36 channels, this family's 16"),
        (
            {"boundary_ratio": 0.9},
            {},
            {},
            "says boundary_ratio=0.9, the request 0.875: .* set sampling.extra.boundary_ratio=0.9",
        ),
        ({"boundary_ratio": 0.875}, {"attention_head_dim": 128, "image_dim": None, "in_channels": 16}, {}, None),
        ({"boundary_ratio": None}, {"attention_head_dim": 24}, {"boundary_ratio": 0.5}, None),
        ({"boundary_ratio": 0.5}, {"attention_head_dim": 32}, {"boundary_ratio": 0.5}, None),
    ],
)
def test_which_checkpoints_are_refused(index, transformer, extra, message):
    rules = family_module("wan2_2", "spec").RULES
    found = list(rules.misfits(index, transformer, {"boundary_ratio": 0.875, **extra}))
    assert len(found) == (message is not None)
    if message is not None:
        with pytest.raises(AssertionError, match=message):
            raise AssertionError(found[0])


@pytest.mark.parametrize("head_dim", range(12, 130, 2))
def test_which_heads_the_two_sides_share_out_alike(head_dim):
    """The engine's tables have 2 (d // 6) channels for height and for width; its forward cuts at d // 3."""
    tables = (head_dim - 4 * (head_dim // 6), 2 * (head_dim // 6))
    cuts = (head_dim - 2 * (head_dim // 3), head_dim // 3)
    assert checkpoint.shared_alike(head_dim) == (tables == cuts)
