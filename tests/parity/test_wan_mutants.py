"""Bugs that Wan2.2 invites, planted on the rollout's side: the recomputation sees each, and the probe names it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from omni_rollout.config import TrainConfig
from omni_rollout.models import family_module
from omni_rollout.models.base import rollout
from omni_rollout.models.base.causes import Setting
from omni_rollout.models.base.velocity import Network
from omni_rollout.nano.random_weights import build_random
from omni_rollout.parity.attribution import Attribution, culprits
from omni_rollout.parity.causes import causes
from omni_rollout.parity.findings import Finding
from omni_rollout.parity.matrix import Cell
from omni_rollout.parity.probe import Probe
from omni_rollout.rollout.engine import RolloutEngine
from omni_rollout.types import SamplingSpec

CELL = Cell(dtype="bfloat16", guidance=3.0, width="24", in_flight="3")
Velocity = Callable[..., torch.Tensor]


@pytest.fixture(scope="module", params=["wan2_2", "wan2_2_i2v"])
def sides(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Probe]:
    family = request.param
    path = build_random(tmp_path_factory.mktemp(family), family=family, seed=5)
    config = TrainConfig()
    config.model.path, config.model.family = str(path), family
    config.sampling.extra = {"frames": 5, "true_cfg_scale_2": 2.0}
    with RolloutEngine(str(path), family=family, dtype="bfloat16", max_num_seqs=3) as engine:
        yield Probe(engine, family_module(family, "policy").load_policy(str(path), torch.bfloat16), config)


def look(sides: Probe) -> tuple[bool, Finding | None]:
    return sides.cell(CELL, 3).exact, sides.first_difference(sides.requests(CELL, 3)[2])


def noticed(sides: Probe) -> tuple[str, str]:
    exact, first = look(sides)
    assert not exact and first is not None
    return first.where, first.name


def named(sides: Probe) -> list[str]:
    """Causes that, broken in the trainer too, bring both sides together again."""
    trajectories = list(sides.engine.generate(sides.requests(CELL, 3)))
    attribution = Attribution(Setting(sides.policy, sides.config.model.family, torch.bfloat16), "random", "bfloat16", 1e-4)
    return [finding.name for finding in culprits(attribution.score(trajectories), attribution.causes(trajectories))]


def tell(monkeypatch: pytest.MonkeyPatch, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Alters what the engine, and only the engine, tells its transformers."""
    original: Velocity = rollout.velocity

    def velocity(network: Network, *args: Any, **kwargs: Any) -> torch.Tensor:
        return original(lambda **inputs: network(**{**inputs, **change(inputs)}), *args, **kwargs)

    monkeypatch.setattr(rollout, "velocity", velocity)


def test_without_a_mutant_nothing_is_reported(sides):
    exact, first = look(sides)
    assert exact and first is None and sides.weights() == []


@pytest.mark.parametrize(("steps", "cause"), [(1, "boundary_late"), (-1, "boundary_early")])
def test_the_wrong_expert_beside_the_boundary(sides, monkeypatch, steps, cause):
    original = SamplingSpec.from_json

    def off_by_one(values: dict[str, Any]) -> SamplingSpec:
        spec = original(values)
        return replace(spec, extra={**spec.extra, "boundary_step": spec.extra["boundary_step"] + steps})

    monkeypatch.setattr(rollout.SamplingSpec, "from_json", off_by_one)
    boundary = sides.requests(CELL, 1)[0].spec.extra["boundary_step"]
    assert noticed(sides) == ("expert", f"step {min(boundary, boundary + steps)}") and named(sides) == [cause]


def test_an_integer_timestep(sides, monkeypatch):
    tell(monkeypatch, lambda inputs: {"timestep": inputs["timestep"].long()})
    assert noticed(sides) == ("input", "timestep") and named(sides) == ["timestep_int64"]


def test_a_timestep_in_bfloat16(sides, monkeypatch):
    tell(monkeypatch, lambda inputs: {"timestep": inputs["timestep"].bfloat16()})
    assert noticed(sides) == ("input", "timestep") and named(sides) == ["timestep_bfloat16"]


def test_frames_in_reverse(sides, monkeypatch):
    tell(monkeypatch, lambda inputs: {"hidden_states": inputs["hidden_states"].flip(2)})
    assert noticed(sides) == ("input", "hidden_states")


def test_height_and_width_swapped_inside(sides, monkeypatch):
    """Told the same, the engine turns the grid before RoPE: only a module can show it."""
    rope = type(next(iter(sides.engine.pipeline.experts.values())).rope)
    forward = rope.forward

    def turned(self: Any, hidden_states: torch.Tensor) -> Any:
        return forward(self, hidden_states.transpose(3, 4))

    monkeypatch.setattr(rope, "forward", turned)
    assert noticed(sides) == ("module", "rope")


def test_the_second_scale_ignored(sides, monkeypatch):
    original: Velocity = rollout.velocity

    def one_scale(network: Network, latents: Any, timesteps: Any, conditions: Any, dtype: Any, *, expert: int) -> torch.Tensor:
        told = [
            replace(row, spec=replace(row.spec, extra={**row.spec.extra, "true_cfg_scale_2": row.spec.true_cfg_scale}))
            for row in conditions
        ]
        return original(network, latents, timesteps, told, dtype, expert=expert)

    monkeypatch.setattr(rollout, "velocity", one_scale)
    boundary = sides.requests(CELL, 1)[0].spec.extra["boundary_step"]
    assert noticed(sides) == ("guidance", f"step {boundary}") and named(sides) == ["one_scale"]


def test_the_zeros_after_the_text_cut_off(sides, monkeypatch):
    def trimmed(inputs: dict[str, Any]) -> dict[str, Any]:
        text = inputs["encoder_hidden_states"]
        return {"encoder_hidden_states": text[:, : int(text.abs().amax(dim=(0, 2)).nonzero().max()) + 1]}

    tell(monkeypatch, trimmed)
    assert noticed(sides) == ("input", "encoder_hidden_states")


def test_weights_of_one_expert_stale(sides):
    parameter = sides.policy.get_parameter("transformer_2.blocks.1.attn2.to_k.weight")
    before = parameter.detach().clone()
    with torch.no_grad():
        parameter.add_(0.02)
    try:
        assert noticed(sides) == ("module", "blocks.1.attn2.to_k")
        assert [finding.name for finding in sides.weights()] == ["transformer_2.blocks.1.attn2.to_k.weight"]
    finally:
        parameter.data = before


def test_channels_of_the_condition_swapped(sides, monkeypatch):
    if sides.config.model.family == "wan2_2":
        pytest.skip("it has none")
    order = [*range(16), *range(20, 36), *range(16, 20)]  # the image before the mask
    tell(monkeypatch, lambda inputs: {"hidden_states": inputs["hidden_states"][:, order]})
    assert noticed(sides) == ("input", "condition")


def test_a_stale_condition(sides, monkeypatch):
    """The engine goes on with the picture of the request before; the record has the right one."""
    if sides.config.model.family == "wan2_2":
        pytest.skip("it has none")
    original: Velocity = rollout.velocity
    stale: list[torch.Tensor] = []

    def velocity(network: Network, latents: Any, timesteps: Any, conditions: Any, dtype: Any, *, expert: int) -> torch.Tensor:
        stale.append(conditions[0].conditions["condition"])
        told = [replace(row, conditions={"condition": stale[0]}) for row in conditions if stale[0].shape == stale[-1].shape]
        return original(network, latents, timesteps, told or conditions, dtype, expert=expert)

    monkeypatch.setattr(rollout, "velocity", velocity)
    assert noticed(sides) == ("input", "condition")


def test_every_cause_of_the_family_costs_bits_here(sides):
    """A rule whose breaking changes nothing guards nothing."""
    trajectories = list(sides.engine.generate(sides.requests(replace(CELL, in_flight="3"), 3)))
    attribution = Attribution(Setting(sides.policy, sides.config.model.family, torch.bfloat16), "random", "bfloat16", 1e-4)
    results = attribution.causes(trajectories)
    assert {result.cause.name for result in results} == {c.name for c in causes("wan2_2")} - {"lora_application"}
    free = {result.cause.name for result in results if result.alone is not None and result.alone.exact}
    assert free <= {"constant_shape", "patch_embedding"}, "in bf16 these hang on the machine; fp32 shows them"
    assert Path(sides.config.model.path).exists()
