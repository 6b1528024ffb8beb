"""Whatever is given or left out, by whichever road, is resolved to one spec; a spec that travels is the same again."""

from __future__ import annotations

import json
import socket
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from omni_rollout.config import CollateConfig, SamplingConfig, ServeConfig
from omni_rollout.data.collate import Collator
from omni_rollout.errors import UserError
from omni_rollout.launch.compose import compose
from omni_rollout.launch.validate import validate
from omni_rollout.models import families, family_module
from omni_rollout.models.base.images import made_image
from omni_rollout.rollout.remote import RemoteEngine
from omni_rollout.rollout.serve.asked import Reader, from_chat
from omni_rollout.rollout.serve.bodies import Chat, Images, Rollouts, parse
from omni_rollout.rollout.serve.images import ImageFolder
from omni_rollout.rollout.serve.start import check_address
from omni_rollout.rollout.serve.wire import to_body
from omni_rollout.types import Prompt, RequestError, RolloutRequest

IMAGES = {"qwen_image_edit": 1, "qwen_image_edit_plus": 2, "qwen_image_layered": 1, "wan2_2_i2v": 1}


class Words:
    """A tokenizer of one token a word, after each family's template."""

    name_or_path = ""

    def __call__(self, text: str) -> dict[str, Any]:
        return {"input_ids": [0] * (len(text.split()) + 64)}


PARAMETERS = st.fixed_dictionaries(
    {},
    optional={
        "num_inference_steps": st.integers(2, 20),
        "true_cfg_scale": st.sampled_from([0.0, 1.0, 1.5, 4.0, 7]),
        "negative_prompt": st.sampled_from(["", " ", "blue"]),
        "noise_level": st.sampled_from([0.0, 0.3, 1]),
        "sde_type": st.sampled_from(["sde", "cps", "dance_sde", "ode"]),
        "log_prob_form": st.sampled_from(["gaussian", "unnormalised"]),
        "prompt_width": st.integers(300, 400),
        "negative_prompt_width": st.integers(300, 400),
    },
)
SIZE = st.one_of(st.just({}), st.fixed_dictionaries({"height": st.sampled_from([64, 96]), "width": st.sampled_from([32, 64])}))
SETTINGS = st.builds(
    SamplingConfig,
    num_inference_steps=st.one_of(st.none(), st.integers(4, 9)),
    true_cfg_scale=st.one_of(st.none(), st.sampled_from([0.0, 1.0, 3.0])),
    negative_prompt=st.one_of(st.none(), st.just("red")),
    seed=st.integers(0, 5),
    sde_window_size=st.one_of(st.none(), st.just(1)),
)


def same(request: RolloutRequest, other: RolloutRequest) -> None:
    assert json.dumps(other.spec.to_json(), sort_keys=True) == json.dumps(request.spec.to_json(), sort_keys=True)
    for name in ("seed", "group_id", "member", "request_id"):
        assert getattr(request, name) == getattr(other, name), name
    assert [image.sha256 for image in request.prompt.images] == [image.sha256 for image in other.prompt.images]


@pytest.mark.parametrize("family", families())
@settings(max_examples=15, deadline=None)
@given(own=SETTINGS, parameters=PARAMETERS, size=SIZE, seed=st.one_of(st.none(), st.integers(0, 2**63 - 1)))
def test_every_road_ends_in_the_same_request(family, own, parameters, size, seed):
    collator = Collator(family, Words(), own, CollateConfig(prompt_width=320))
    folder = ImageFolder(2048 * 2048)
    reader = Reader(collator, ServeConfig(), folder)
    images = tuple(made_image(number, 64, 80) for number in range(IMAGES.get(family, 0)))
    asked = {**parameters, **size}
    if images and family.startswith("qwen_image_edit"):
        asked["extra"] = {"vae_area": 64 * 64, "vision_area": 56 * 56}
    try:
        request = collator.asked(Prompt(text="a red cat", images=images), asked, seed=seed)
    except RequestError:
        return
    # A trainer's request, with all of its spec: in process and by Ray it goes as it is, over HTTP it is resolved again.
    travelled = parse(Rollouts, json.dumps(to_body([request])).encode())
    batch = reader.rollouts(travelled)
    same(request, batch.requests[0])
    # A client's, with the parameters that are given and no others.
    body: dict[str, Any] = {
        "requests": [{"prompt": "a red cat", "sampling": asked, "seed": seed, "images": to_body([request])["images"]}]
    }
    given_alone = reader.rollouts(parse(Rollouts, json.dumps(body).encode()))
    same(request, given_alone.requests[0])
    for one in (batch, given_alone):
        reader.release(one)
    assert not len(folder)


@settings(max_examples=30, deadline=None)
@given(
    parameters=PARAMETERS, size=SIZE, own=SETTINGS, inside=st.booleans(), name=st.sampled_from(["true_cfg_scale", "cfg_scale"])
)
def test_openais_words_mean_the_same(parameters, size, own, inside, name):
    collator = Collator("qwen_image", Words(), own, CollateConfig(prompt_width=320))
    reader = Reader(collator, ServeConfig(), ImageFolder(2048 * 2048))
    kept = {
        key: parameters[key]
        for key in ("num_inference_steps", "negative_prompt", "noise_level", "sde_type")
        if key in parameters
    }
    scale = {"true_cfg_scale": parameters["true_cfg_scale"]} if "true_cfg_scale" in parameters else {}
    try:
        request = collator.asked(Prompt(text="a red cat"), {**kept, **scale, **size}, seed=7)
    except RequestError:
        return
    theirs = {**kept, **dict.fromkeys([name] if scale else [], scale.get("true_cfg_scale")), "seed": 7}
    sized = {"size": f"{size['width']}x{size['height']}"} if size else {}
    image = parse(Images, json.dumps({"prompt": "a red cat", "model": "m", **theirs, **sized}).encode())
    same(request, reader.generation(image).requests[0])
    outer = {"extra_body": {**theirs, **size}} if inside else {**theirs, **size}
    chat = {"messages": [{"role": "user", "content": [{"type": "text", "text": "a red cat"}]}], **outer}
    same(request, reader.generation(from_chat(parse(Chat, json.dumps(chat).encode()))).requests[0])


def test_every_field_of_a_body_has_a_place():
    """A field that is read and forgotten would be a parameter dropped in silence."""
    plain = parse(Images, json.dumps({"prompt": "a"}).encode())
    collator = Collator("qwen_image", Words(), SamplingConfig(), CollateConfig(prompt_width=320))
    reader = Reader(collator, ServeConfig(), ImageFolder(2048 * 2048))
    without = reader.generation(plain).requests
    changed: dict[str, Any] = {
        "n": 2, "size": "64x64", "height": 64, "width": 64, "negative_prompt": "b", "num_inference_steps": 3,
        "guidance_scale": 2.0, "true_cfg_scale": 2.0, "cfg_scale": 2.0, "seed": 3, "num_outputs_per_prompt": 2,
        "noise_level": 0.1, "sde_type": "cps", "prompt": "b",
    }  # fmt: skip
    refused = {
        "layers": 2,
        "resolution": 640,
        "num_frames": 5,
        "guidance_scale_2": 2.0,
        "extra_params": {"a": 1},
        "images": ["AAAA"],
    }
    as_it_is = {"model", "response_format", "output_format", "quality", "background", "user"}
    nothing = as_it_is | {"generator_device", "vae_use_slicing", "vae_use_tiling"}
    assert Images.model_fields.keys() == changed.keys() | refused.keys() | nothing
    for name, value in changed.items():
        body = parse(
            Images,
            json.dumps({"prompt": "a", "true_cfg_scale": 4.0 if name == "negative_prompt" else None, name: value}).encode(),
        )
        assert reader.generation(body).requests != without, name
    for name, value in refused.items():
        with pytest.raises(Exception, match=r"no such parameter|takes none|not readable") as error:
            reader.generation(parse(Images, json.dumps({"prompt": "a", name: value}).encode()))
        assert type(error.value).__name__ == "BadRequest", name


def test_the_families_have_their_images():
    assert {family: family_module(family, "spec").RULES.images for family in families()} == {
        "qwen_image": (0, 0), "qwen_image_edit": (1, 1), "qwen_image_edit_plus": (1, 4), "qwen_image_layered": (1, 1),
        "wan2_2": (0, 0), "wan2_2_i2v": (1, 1),
    }  # fmt: skip


def test_only_loopback_is_served_without_a_secret(monkeypatch):
    monkeypatch.delenv("OMNI_ROLLOUT_TOKEN", raising=False)
    check_address("127.0.0.1")
    with pytest.raises(UserError, match=r"serve.host=0.0.0.0: .*set OMNI_ROLLOUT_TOKEN"):
        check_address("0.0.0.0")
    monkeypatch.setenv("OMNI_ROLLOUT_TOKEN", "short")
    with pytest.raises(UserError, match="expected 16 or more"):
        check_address("127.0.0.1")
    monkeypatch.setenv("OMNI_ROLLOUT_TOKEN", "0123456789abcdef")
    check_address("0.0.0.0")


@pytest.mark.parametrize(("url", "said"), [("127.0.0.1:1", "expected http://HOST:PORT"), ("http://a b", "expected http")])
def test_an_address_that_is_none_is_said_at_once(tmp_path, url, said):
    (tmp_path / "prompts.txt").write_text("a\n")
    config = compose(["model=nano", f"prompts={tmp_path}/prompts.txt", f"run_dir={tmp_path}/run"])
    config.rollout.url = url
    with pytest.raises(UserError, match=said):
        validate(config)


def test_nobody_there_is_said_at_once():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
        with pytest.raises(UserError, match="is omni-rollout serve running there"):
            RemoteEngine(url)
