"""What a request means to Qwen-Image's relatives with input images: sizes, own parameters, refusals; and their rewards."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from omni_rollout.config import CollateConfig, SamplingConfig
from omni_rollout.data.collate import Collator
from omni_rollout.errors import PinnedKnobError, UserError
from omni_rollout.models import family_module
from omni_rollout.models.base import qwen_processor
from omni_rollout.models.base.encodings import Encodings
from omni_rollout.models.base.images import made_image
from omni_rollout.models.base.velocity import Conditioning
from omni_rollout.models.qwen_image_edit import spec as edit
from omni_rollout.models.qwen_image_layered import spec as layered
from omni_rollout.plan.closest import plan
from omni_rollout.rewards import WeightedSum
from omni_rollout.rewards.recomposition import recomposed
from omni_rollout.types import InputImage, Prompt, RequestError, SamplingSpec

FAMILIES = ("qwen_image_layered", "qwen_image_edit", "qwen_image_edit_plus")


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
        "resolution": st.none() | st.sampled_from([256, 640, 1024]),
        "cfg_normalize": st.none() | st.booleans(),
    },
}
OWN["qwen_image_edit"] = OWN["qwen_image_edit_plus"] = {
    "vae_area": st.none() | st.integers(256 * 256, 2048 * 2048),
    "vision_area": st.none() | st.integers(256 * 256, 1024 * 1024),
}
MOST_IMAGES = {"qwen_image_layered": 1, "qwen_image_edit": 1, "qwen_image_edit_plus": 4}


@pytest.mark.parametrize("family", FAMILIES)
@given(data=st.data(), values=VALUES, size=st.none() | st.tuples(MULTIPLES, MULTIPLES))
@settings(deadline=None, max_examples=60)
def test_a_resolved_spec_resolves_to_itself(family: str, data: Any, values: dict[str, Any], size: Any) -> None:
    images = data.draw(st.lists(IMAGES, min_size=1, max_size=MOST_IMAGES[family]))
    extra = data.draw(st.fixed_dictionaries({}, optional=OWN[family]))
    if family != "qwen_image_layered" and data.draw(st.booleans()):
        extra["image_sizes"] = [[32 + 16 * place, 64] for place in range(len(images))]
        extra["vision_sizes"] = [[50, 60 + place] for place in range(len(images))]
    given_size = {} if size is None else {"height": size[0], "width": size[1]}
    spec = resolved(family, images, **values, **given_size, extra=extra)
    again = {key: value for key, value in asdict(spec).items() if key != "family"}
    again["step_indices"] = again["step_indices"] or None
    assert family_module(family, "spec").resolve(again, images) == spec == SamplingSpec.from_json(spec.to_json())
    assert None not in spec.extra.values() and spec.family == family
    layout = family_module(family, "spec").layout(spec)
    assert layout.tokens == layout.latent[0] + layout.conditions["image_latents"][0]
    assert (spec.height, spec.width) == (size or (spec.height, spec.width)) and layout.media[-3:-1] == (spec.height, spec.width)
    assert layout.tokens == sum(frames * rows * columns for frames, rows, columns in layout.grid)


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
        ({}, [image(1, 9000)], "is narrower than 16"),
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
    assert rewards([same], [prompt]).total == [1.0] and 0 <= (rewards([other], [prompt]).total[0] or 0) < 0.2
    with pytest.raises(UserError, match="'no picture' has no input image"):
        rewards.check([Prompt(text="no picture")], "layers")
    with pytest.raises(UserError, match="reward recomposition scores layers, this model makes image"):
        rewards.check([prompt], "image")
    for name in ("ocr", "jpeg_compressibility"):
        with pytest.raises(UserError, match=f"reward {name} scores image, this model makes layers"):
            WeightedSum({name: 1.0}).check([prompt], "layers")
    (failure,) = rewards([same[0, :, :, :3]], [prompt]).failures
    assert "expected a uint8 array [L, H, W, 4]" in failure


class WordTokenizer:
    """One token a word, one a special token; its checkpoint says how many pixels an image may have."""

    def __init__(self, checkpoint: Path) -> None:
        self.name_or_path = str(checkpoint)

    def __call__(self, text: str) -> dict[str, list[str]]:
        return {"input_ids": re.findall(r"<\|[a-z_]+\|>|\w+", text)}


def checkpoint_with(folder: Path, most_pixels: int) -> Path:
    (folder / "processor").mkdir(parents=True)
    size = {"shortest_edge": 56 * 56, "longest_edge": most_pixels}
    (folder / "processor" / "preprocessor_config.json").write_text(
        json.dumps({"size": size, "merge_size": 2, "patch_size": 14})
    )
    return folder


@pytest.mark.parametrize(
    ("area", "most_pixels", "tokens"), [(64, 10**8, 4), (384, 10**8, 196), (1024, 10**8, 1369), (1024, 28 * 28 * 1280, 1225)]
)
def test_image_tokens_are_part_of_the_texts_width(tmp_path: Path, area: int, most_pixels: int, tokens: int) -> None:
    tokenizer = WordTokenizer(checkpoint_with(tmp_path / "model", most_pixels))
    spec = resolved("qwen_image_edit", [image(500, 500)], extra={"vision_area": area * area})
    text = family_module("qwen_image_edit", "spec").text_tokens
    one, other = (text(tokenizer, words, spec) for words in ("make it red", "make it red and blue"))
    words = len(tokenizer(edit.TEMPLATE.format(edit.PICTURE, "make it red"))["input_ids"])
    assert other == one + 2 and one == words - 64 - 1 + tokens
    assert text(tokenizer, " ", spec) == one - 3, "the negative prompt is shown the same picture"


def test_every_picture_counts(tmp_path: Path) -> None:
    tokenizer = WordTokenizer(checkpoint_with(tmp_path / "model", 10**8))
    text = family_module("qwen_image_edit_plus", "spec").text_tokens
    pictures = [image(500, 500), image(500, 1000), image(500, 500)]
    widths = [text(tokenizer, "red", resolved("qwen_image_edit_plus", pictures[:number])) for number in (1, 2, 3)]
    # "Picture", its number, two tokens around the picture; 384x384 pixels are 14 x 14 tokens, 256x544 are 9 x 19.
    assert [after - before for before, after in pairwise(widths)] == [4 + 9 * 19, 4 + 14 * 14]


def test_a_checkpoint_without_its_processor_is_named(tmp_path: Path) -> None:
    tokenizer = WordTokenizer(tmp_path)
    with pytest.raises(RequestError, match=r"no processor/preprocessor_config\.json"):
        family_module("qwen_image_edit", "spec").text_tokens(tokenizer, "red", resolved("qwen_image_edit", [image()]))


def test_sizes_of_edit_follow_from_its_images() -> None:
    spec = resolved("qwen_image_edit_plus", [image(480, 640), image(640, 480)])
    assert (spec.height, spec.width) == (896, 1184), "the first image's, of 1024 x 1024 in area"
    assert spec.extra["image_sizes"] == [[896, 1184], [1184, 896]] and spec.extra["vision_sizes"] == [[320, 448], [448, 320]]
    assert resolved("qwen_image_edit", [image(480, 640)]).extra["vision_sizes"] == [[896, 1184]], "Edit shows it in full"
    layout = family_module("qwen_image_edit_plus", "spec").layout(spec)
    assert layout.grid == ((1, 56, 74), (1, 56, 74), (1, 74, 56)) and layout.conditions == {
        "image_latents": (2 * 56 * 74, None)
    }


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"image_sizes": [[64, 64], [64, 64]]}, "image_sizes has 2 sizes, the prompt has 1 images"),
        ({"image_sizes": [[60, 64]]}, r"image_sizes=\[\[60, 64\]\]: expected .*multiples of 16"),
        ({"vision_sizes": [[60]]}, r"vision_sizes=\[\[60\]\]: expected"),
        ({"vae_area": 0}, "vae_area=0: expected a number of pixels"),
        ({"vae_are": 9}, "has no such parameter; did you mean vae_area"),
    ],
)
@pytest.mark.parametrize("family", ["qwen_image_edit", "qwen_image_edit_plus"])
def test_sizes_that_cannot_be_are_refused(family: str, extra: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        resolved(family, [image()], extra=extra)


def test_too_many_pictures() -> None:
    with pytest.raises(RequestError, match="the prompt has 2, qwen_image_edit takes 1"):
        resolved("qwen_image_edit", [image(), image()])
    with pytest.raises(RequestError, match="the prompt has 5, qwen_image_edit_plus takes 1 to 4"):
        resolved("qwen_image_edit_plus", [image()] * 5)


def test_the_processor_says_which_versions_it_was_written_for(monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = ModuleType("pipeline")
    with pytest.raises(PinnedKnobError, match="pipeline has no Qwen2VLProcessor to stand in for"):
        qwen_processor.pil_processor(pipeline)
    stock = pipeline.Qwen2VLProcessor = object()  # type: ignore[attr-defined]
    with qwen_processor.pil_processor(pipeline):
        assert pipeline.Qwen2VLProcessor is qwen_processor.PILProcessor
    assert pipeline.Qwen2VLProcessor is stock
    monkeypatch.setattr(qwen_processor, "version", lambda package: "9.9")
    with pytest.raises(PinnedKnobError, match=r"transformers is 9\.9: the processor without torchvision was written for 5\.10"):
        qwen_processor.pil_processor(pipeline)


def test_encodings_are_kept_for_what_they_depend_on() -> None:
    made: list[Prompt] = []

    def encode(prompt: Prompt, spec: SamplingSpec) -> Conditioning:
        made.append(prompt)
        none: Any = {"negative_prompt_embeds": None, "negative_prompt_embeds_mask": None}
        return Conditioning(
            prompt_embeds=torch.zeros(1, 1), prompt_embeds_mask=torch.ones(1, dtype=torch.bool), spec=spec, **none
        )

    kept = Encodings(2)
    prompt, spec = Prompt(text="a", images=(image(),)), resolved("qwen_image_edit", [image()])
    longer = replace(spec, num_inference_steps=9)
    assert kept.take(prompt, spec, encode).spec == spec and kept.take(prompt, longer, encode).spec == longer and len(made) == 1
    kept.take(replace(prompt, images=(replace(image(), path="elsewhere"),)), spec, encode)
    assert len(made) == 1, "a picture is its bytes"
    changes: list[tuple[Prompt, SamplingSpec]] = [
        (replace(prompt, text="b"), spec),
        (replace(prompt, images=(replace(image(), sha256="1" * 64),)), spec),
        (prompt, replace(spec, prompt_width=17)),
        (prompt, replace(spec, negative_prompt="none")),
        (prompt, replace(spec, negative_prompt_width=3)),
        (prompt, replace(spec, height=64)),
        (prompt, replace(spec, extra={**spec.extra, "vision_sizes": [[56, 56]]})),
    ]
    for number, (other, its_spec) in enumerate(changes, start=2):
        kept.take(other, its_spec, encode)
        assert len(made) == number, "another text, picture, width or size is another encoding"
    kept.take(prompt, spec, encode)
    assert len(made) == len(changes) + 2 and len(kept._kept) == 2, "the last two are kept"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_plan_counts_the_tokens_of_input_images(family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = {"qwen_image_layered": "Layered", "qwen_image_edit": "Edit", "qwen_image_edit_plus": "Edit-2511"}[family]
    own = [f"model.family={family}", f"model.path=Qwen/Qwen-Image-{model}", "gpus=8x640", "trainer.gradient_checkpointing=true"]
    plan(own)
    told = re.sub(r"\s+", " ", capsys.readouterr().out)
    tokens = {"qwen_image_layered": 6 * 1600, "qwen_image_edit": 2 * 4096, "qwen_image_edit_plus": 2 * 4096}[family]
    assert f"rows of {tokens} + 256" in told and "assumed: 1 input image of 1024x1024 a prompt" in told
    assert "with its vision tower" in told
    with pytest.raises(RequestError, match="give both, or neither"):
        plan([*own, "sampling.height=64"])
