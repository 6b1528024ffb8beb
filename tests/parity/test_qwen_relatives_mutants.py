"""Known bugs of pipelines with input images, planted on the rollout's side: the probe must see each, and name it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from omni_rollout.config import TrainConfig
from omni_rollout.models import family_module
from omni_rollout.models.base import encodings, rollout
from omni_rollout.models.base.causes import Setting
from omni_rollout.models.base.velocity import Network
from omni_rollout.parity.attribution import LORA, Attribution, culprits
from omni_rollout.parity.causes import causes
from omni_rollout.parity.findings import Finding
from omni_rollout.parity.matrix import Cell, Matrix
from omni_rollout.parity.probe import CellResult, Probe
from tests.parity.relatives import FAMILIES, Relative

IMAGES = 5  # the fifth has the text of the first, and another picture
PADDED = Cell(dtype="bfloat16", guidance=4.0, width="64", in_flight=str(IMAGES))


@contextmanager
def sides_of(family: str, folder: Any) -> Iterator[Probe]:
    relative = Relative(family, "bfloat16", folder, places=IMAGES)
    config = TrainConfig()
    config.model.path, config.model.family = relative.checkpoint, family
    try:
        yield Probe(relative.engine, relative.policy, config)
    finally:
        relative.engine.close()


@pytest.fixture(scope="module", params=FAMILIES)
def sides(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Probe]:
    with sides_of(request.param, tmp_path_factory.mktemp("mutants")) as probe:
        yield probe


@dataclass
class Seen:
    result: CellResult
    first: Finding | None

    @property
    def where(self) -> tuple[str, str]:
        assert self.first is not None
        return self.first.where, self.first.name


def look(sides: Probe) -> Seen:
    return Seen(sides.cell(PADDED, IMAGES), sides.first_difference(sides.requests(PADDED, IMAGES)[2]))


def named(sides: Probe) -> list[str]:
    """Causes with which the trainer, broken as well, agrees."""
    trajectories = list(sides.engine.generate(sides.requests(PADDED, IMAGES)))
    family = sides.config.model.family
    attribution = Attribution(Setting(sides.policy, family, sides.dtype), "random", "bfloat16", 1e-4)
    measured = [cause.name for cause in causes(family) if not cause.slow and cause is not LORA]
    results = [attribution.cause(name, trajectories) for name in measured]
    return [finding.name for finding in culprits(attribution.score(trajectories), results)]


def wrap_velocity(monkeypatch: pytest.MonkeyPatch, change: Any) -> None:
    """Lets `change(inputs)` alter what the engine, and only the engine, tells its transformer."""
    original = rollout.velocity

    def velocity(network: Network, *args: Any, **kwargs: Any) -> torch.Tensor:
        return original(lambda **inputs: network(**change(dict(inputs))), *args, **kwargs)

    monkeypatch.setattr(rollout, "velocity", velocity)


def target_tokens(sides: Probe, inputs: dict[str, Any]) -> int:
    return family_module(sides.config.model.family, "probe").told(inputs)["hidden_states"].shape[1]


def skip_unless(sides: Probe, *families: str) -> None:
    if sides.config.model.family not in families:
        pytest.skip(f"a bug of {' and '.join(families)}")


def test_without_a_mutant_nothing_is_reported(sides: Probe) -> None:
    seen = look(sides)
    assert seen.result.exact and seen.first is None and sides.weights() == []


def test_condition_latents_of_another_request(sides: Probe, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the first picture was encoded to stays where the next should be."""
    kept: dict[tuple[int, ...], torch.Tensor] = {}

    def stale(inputs: dict[str, Any]) -> dict[str, Any]:
        whole, target = inputs["hidden_states"], target_tokens(sides, inputs)
        first = kept.setdefault(tuple(whole.shape[1:]), whole[:1, target:].clone())
        beside = first.expand(len(whole), -1, -1)
        return {**inputs, "hidden_states": torch.cat([whole[:, :target], beside], dim=1)}

    wrap_velocity(monkeypatch, stale)
    seen = look(sides)
    assert not seen.result.exact and seen.where == ("input", "image_latents")


def test_condition_latents_swapped_within_a_batch(sides: Probe, monkeypatch: pytest.MonkeyPatch) -> None:
    """Alone, an image has nobody to swap with: what is named is its company."""

    def swapped(inputs: dict[str, Any]) -> dict[str, Any]:
        whole, target = inputs["hidden_states"], target_tokens(sides, inputs)
        return {**inputs, "hidden_states": torch.cat([whole[:, :target], whole[:, target:].flip(0)], dim=1)}

    wrap_velocity(monkeypatch, swapped)
    seen = look(sides)
    assert not seen.result.exact and seen.first is None
    matrix = Matrix(guidance=(4.0,), width=("64",), in_flight=(str(IMAGES),), images=IMAGES)
    assert [(found.where, found.name) for found in sides.first_differences(matrix, [seen.result])] == [("batch", "in flight")]


@pytest.mark.parametrize("forgotten, name", [(1, "conditions"), (0, "prompt_embeds")], ids=["pictures", "text"])
def test_a_stale_cache_of_encodings(sides: Probe, monkeypatch: pytest.MonkeyPatch, forgotten: int, name: str) -> None:
    original = encodings.encoding_key

    def without(*args: Any) -> tuple[object, ...]:
        key = original(*args)
        return key[:forgotten] + key[forgotten + 1 :]

    if name == "prompt_embeds":  # else no two of the probe's images share their pictures
        pictures = family_module(sides.config.model.family, "probe").pictures(0)
        monkeypatch.setattr(family_module(sides.config.model.family, "probe"), "pictures", lambda _: pictures)
    kept = sides.engine.pipeline.encodings
    kept._kept.clear()
    monkeypatch.setattr(encodings, "encoding_key", without)
    result = sides.cell(PADDED, IMAGES)
    kept._kept.clear()
    assert result.measure is not None and result.measure.exact, "the record holds what was used: recomputation cannot see it"
    assert not result.exact and {finding.where for finding in result.findings} == {"encoding"}
    assert all(name in finding.what for finding in result.findings)


def test_an_additional_t_cond_of_one(sides: Probe, monkeypatch: pytest.MonkeyPatch) -> None:
    skip_unless(sides, "qwen_image_layered")
    wrap_velocity(monkeypatch, lambda inputs: {**inputs, "additional_t_cond": torch.ones_like(inputs["additional_t_cond"])})
    seen = look(sides)
    assert not seen.result.exact and seen.where == ("input", "additional_t_cond")
    assert named(sides) == ["additional_t_cond"]


@pytest.mark.parametrize("tokens", ["fewer", "as many"])
def test_a_layer_too_few_in_the_grid(sides: Probe, monkeypatch: pytest.MonkeyPatch, tokens: str) -> None:
    skip_unless(sides, "qwen_image_layered")

    def short(inputs: dict[str, Any]) -> dict[str, Any]:
        grids = []
        for (_, rows, columns), *others in inputs["img_shapes"]:
            grids.append(others if tokens == "fewer" else [(2, rows, columns), *others[1:]])
        return {**inputs, "img_shapes": grids}

    wrap_velocity(monkeypatch, short)
    seen = look(sides)
    assert not seen.result.exact
    if tokens == "fewer":  # RoPE's table is too short: no image comes out
        assert seen.result.measure is None and seen.first is not None and seen.first.where == "engine"
    else:
        assert seen.where == ("input", "img_shapes")


def test_input_images_in_another_order(sides: Probe, monkeypatch: pytest.MonkeyPatch) -> None:
    skip_unless(sides, "qwen_image_edit_plus")

    def reversed_(inputs: dict[str, Any]) -> dict[str, Any]:
        grid, target = inputs["img_shapes"][0][1:], target_tokens(sides, inputs)
        whole = inputs["hidden_states"]
        images = whole[:, target:].split([frames * rows * columns for frames, rows, columns in grid], dim=1)
        return {**inputs, "hidden_states": torch.cat([whole[:, :target], *images[::-1]], dim=1)}

    wrap_velocity(monkeypatch, reversed_)
    seen = look(sides)
    assert not seen.result.exact and seen.where == ("input", "image_latents")
    assert named(sides) == ["image_order"]


def test_zero_cond_t_ignored_on_one_side(sides: Probe, monkeypatch: pytest.MonkeyPatch) -> None:
    skip_unless(sides, "qwen_image_edit_plus")
    layers = [layer for layer in sides.engine.pipeline.transformer.modules() if getattr(layer, "zero_cond_t", False)]
    assert len(layers) > 1, "this checkpoint modulates input images by t=0"
    for layer in layers:
        monkeypatch.setattr(layer, "zero_cond_t", False)
    seen = look(sides)
    assert not seen.result.exact and seen.first is not None and seen.first.where == "module"
    assert named(sides) == ["zero_cond_t"]


def test_a_picture_that_the_text_encoder_is_not_shown(sides: Probe, monkeypatch: pytest.MonkeyPatch) -> None:
    """Embeddings of another picture on one side alone."""
    skip_unless(sides, "qwen_image_edit", "qwen_image_edit_plus")
    kept: dict[tuple[int, ...], torch.Tensor] = {}

    def stale(inputs: dict[str, Any]) -> dict[str, Any]:
        text = inputs["encoder_hidden_states"]
        return {**inputs, "encoder_hidden_states": kept.setdefault(tuple(text.shape[1:]), text[:1].clone()).expand_as(text)}

    wrap_velocity(monkeypatch, stale)
    seen = look(sides)
    assert not seen.result.exact and seen.where == ("input", "encoder_hidden_states")


def test_guidance_renormalised_on_one_side(sides: Probe, monkeypatch: pytest.MonkeyPatch) -> None:
    velocity = family_module(sides.config.model.family, "velocity")
    original, renormalise = rollout.velocity, velocity.renormalise

    def mutant(*args: Any, **kwargs: Any) -> torch.Tensor:
        with monkeypatch.context() as patch:
            patch.setattr(velocity, "renormalise", lambda spec: not renormalise(spec))
            return original(*args, **kwargs)

    monkeypatch.setattr(rollout, "velocity", mutant)
    seen = look(sides)
    assert not seen.result.exact and seen.first is not None and seen.first.where == "guidance"


def test_every_cause_of_its_own_costs_bits(sides: Probe) -> None:
    family = sides.config.model.family
    trajectories = list(sides.engine.generate(sides.requests(PADDED, IMAGES)))
    attribution = Attribution(Setting(sides.policy, family, sides.dtype), "random", "bfloat16", 1e-4)
    parent = family_module(family_module(family, "spec").PARENT, "causes").CAUSES
    own = [cause.name for cause in family_module(family, "causes").CAUSES if cause not in parent]
    costs = {name: attribution.cause(name, trajectories).alone for name in own}
    assert attribution.score(trajectories).exact
    assert own and all(measure is not None and not measure.exact for measure in costs.values())


def test_the_suite_left_no_mutant_behind(sides: Probe) -> None:
    assert look(sides).result.exact
