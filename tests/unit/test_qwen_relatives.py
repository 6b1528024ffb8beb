"""What a request means to Qwen-Image's relatives with input images: sizes, own parameters, refusals; and their rewards."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from omni_rollout.config import CollateConfig, SamplingConfig
from omni_rollout.data.collate import Collator
from omni_rollout.errors import UserError
from omni_rollout.models import family_module
from omni_rollout.models.base.images import made_image
from omni_rollout.models.qwen_image_layered import spec as layered
from omni_rollout.rewards import WeightedSum
from omni_rollout.rewards.recomposition import recomposed
from omni_rollout.types import InputImage, Prompt, RequestError, SamplingSpec

FAMILIES = ("qwen_image_layered",)


def image(height: int = 480, width: int = 640) -> InputImage:
    return InputImage(path="a.png", sha256="0" * 64, height=height, width=width)


def resolved(family: str, images: list[InputImage], **values: Any) -> SamplingSpec:
    return family_module(family, "spec").resolve({"prompt_width": 16, **values}, images)


SIDES = st.integers(100, 3000)
IMAGES = st.builds(image, SIDES, SIDES)
MULTIPLES = st.integers(1, 60).map(lambda number: 16 * number)
VALUES = st.fixed_dictionaries(
    {},
    optional={
        "num_inference_steps": st.none() | st.integers(2, 60),
        "true_cfg_scale": st.none() | st.floats(0, 10),
        "noise_level": st.none() | st.floats(0, 1),
        "sde_type": st.sampled_from(["sde", "cps", "dance_sde", "ode"]),
        "negative_prompt_width": st.none() | st.integers(1, 64),
        "negative_prompt": st.none() | st.text("ab ", max_size=4),
    },
)
OWN: dict[str, Any] = {
    "qwen_image_layered": {
        "layers": st.none() | st.integers(1, 8),
        "resolution": st.none() | st.sampled_from([64, 640, 1024]),
        "cfg_normalize": st.none() | st.booleans(),
    },
}
MOST_IMAGES = {"qwen_image_layered": 1}


@pytest.mark.parametrize("family", FAMILIES)
@given(data=st.data(), values=VALUES, size=st.none() | st.tuples(MULTIPLES, MULTIPLES))
@settings(deadline=None, max_examples=60)
def test_a_resolved_spec_resolves_to_itself(family: str, data: Any, values: dict[str, Any], size: Any) -> None:
    images = data.draw(st.lists(IMAGES, min_size=1, max_size=MOST_IMAGES[family]))
    extra = data.draw(st.fixed_dictionaries({}, optional=OWN[family]))
    given_size = {} if size is None else {"height": size[0], "width": size[1]}
    spec = resolved(family, images, **values, **given_size, extra=extra)
    again = {key: value for key, value in asdict(spec).items() if key != "family"}
    again["step_indices"] = again["step_indices"] or None
    assert family_module(family, "spec").resolve(again, images) == spec == SamplingSpec.from_json(spec.to_json())
    assert None not in spec.extra.values() and spec.family == family
    layout = family_module(family, "spec").layout(spec)
    assert layout.tokens == layout.latent[0] + layout.conditions["image_latents"][0]
    assert (spec.height, spec.width) == (size or (spec.height, spec.width)) and layout.media[-3:-1] == (spec.height, spec.width)


@pytest.mark.parametrize("family", FAMILIES)
def test_zero_is_zero_and_none_is_the_default(family: str) -> None:
    spec = resolved(family, [image()], true_cfg_scale=0.0, num_inference_steps=None)
    assert spec.true_cfg_scale == 0.0 and not spec.guided and spec.num_inference_steps == 50
    default = resolved(family, [image()])
    assert default.true_cfg_scale == 4.0 and default.negative_prompt == " "
    assert resolved(family, [image()], noise_level=0.0).sde_type == "ode"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("values", "images", "message"),
    [
        ({}, [], "the prompt has 0"),
        ({"height": 64}, [image()], "give both, or neither"),
        ({"height": 100, "width": 64}, [image()], "height=100: expected a multiple of 16 pixels; the nearest is 96"),
        ({"extra": {"frames": 5}}, [image()], "has no such parameter.*known: "),
        ({"num_inference_steps": 0}, [image()], "num_inference_steps=0"),
        ({}, [image(1, 4000)], "is narrower than 16"),
    ],
)
def test_what_cannot_be_served_is_refused(family: str, values: dict[str, Any], images: list[InputImage], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        resolved(family, images, **values)


def test_layers_count_as_frames_and_the_composite_beside_them() -> None:
    spec = resolved("qwen_image_layered", [image(480, 640)], extra={"resolution": 640})
    assert (spec.height, spec.width) == (544, 736), "the area of 640x640 in the image's aspect ratio, multiples of 32"
    layout = layered.layout(spec)
    assert layout.frames == 5 and layout.media == (4, 544, 736, 4) and layout.tokens == 6 * 34 * 46
    with pytest.raises(RequestError, match=r"sampling\.extra\.layers=0: expected 1 or more"):
        resolved("qwen_image_layered", [image()], extra={"layers": 0})
    with pytest.raises(RequestError, match="the prompt has 2, qwen_image_layered takes 1"):
        resolved("qwen_image_layered", [image(), image()])


def test_layered_has_a_schedule_of_its_own() -> None:
    """Shifted by the input image's tokens alone, whatever the number of layers."""
    config = {"use_dynamic_shifting": True, "time_shift_type": "exponential"}
    few, many = (resolved("qwen_image_layered", [image()], height=256, width=256, extra={"layers": n}) for n in (1, 8))
    sigmas = [layered.schedule(spec, config).sigmas for spec in (few, many)]
    assert (sigmas[0] == sigmas[1]).all()
    linear = np.linspace(1, 0, 51)[:-1]
    expected = np.e / (np.e + (1 / linear - 1))  # mu = sqrt(256 / 256)
    assert np.allclose(sigmas[0][:-1].numpy(), expected, rtol=1e-6)


def test_layered_needs_a_text() -> None:
    collator = Collator("qwen_image_layered", lambda text: {"input_ids": [0] * 40}, SamplingConfig(), CollateConfig())
    picture = made_image(0, 64, 64)
    spec = collator.spec(images=[picture])
    collator.check(spec, Prompt(text="a cat", images=(picture,)))
    with pytest.raises(RequestError, match="the prompt is empty: qwen_image_layered needs a text"):
        collator.check(spec, Prompt(text=" ", images=(picture,)))


def test_layers_laid_over_each_other() -> None:
    opaque = np.full((2, 2, 4), (10, 20, 30, 255), np.uint8)
    clear = np.full((2, 2, 4), (200, 200, 200, 0), np.uint8)
    half = np.full((2, 2, 4), (110, 120, 130, 51), np.uint8)
    assert recomposed(np.stack([clear])).tolist() == np.full((2, 2, 3), 255.0).tolist()
    assert np.allclose(recomposed(np.stack([opaque, clear, half]))[0, 0], [30, 40, 50])


def test_the_reward_of_layers(tmp_path: Path) -> None:
    from PIL import Image

    from omni_rollout.models.base.images import describe

    Image.fromarray(np.full((32, 32, 4), (10, 20, 30, 255), np.uint8)).save(tmp_path / "a.png")
    prompt = Prompt(text="dark", images=(describe(tmp_path / "a.png"),))
    rewards = WeightedSum({"recomposition": 1.0})
    rewards.check([prompt], "layers")
    same, other = np.full((2, 16, 16, 4), (10, 20, 30, 255), np.uint8), np.zeros((2, 16, 16, 4), np.uint8)
    assert rewards([same], [prompt]).total == [1.0] and 0 <= rewards([other], [prompt]).total[0] < 0.2
    with pytest.raises(UserError, match="'no picture' has no input image"):
        rewards.check([Prompt(text="no picture")], "layers")
    with pytest.raises(UserError, match="reward recomposition scores layers, this model makes image"):
        rewards.check([prompt], "image")
    for name in ("ocr", "jpeg_compressibility"):
        with pytest.raises(UserError, match=f"reward {name} scores image, this model makes layers"):
            WeightedSum({name: 1.0}).check([prompt], "layers")
    with pytest.raises(ValueError, match=r"expected a uint8 array \[L, H, W, 4\]"):
        rewards([same[0, :, :, :3]], [prompt])
