"""Known bugs, planted on the rollout's side: the probe must see each, and name it.

A mutant that survives is a bug of this suite. Which setting shows which bug: docs/parity.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from omni_rollout.config import TrainConfig
from omni_rollout.diffusion import products
from omni_rollout.diffusion.exact_ops import effective_weights
from omni_rollout.diffusion.guidance import guide
from omni_rollout.models.base import rollout
from omni_rollout.models.base.causes import Setting
from omni_rollout.models.base.velocity import Network
from omni_rollout.models.qwen_image import spec as family_spec
from omni_rollout.models.qwen_image.policy import load_policy
from omni_rollout.models.qwen_image.rollout import QwenImageRolloutPipeline
from omni_rollout.parity.attribution import Attribution, culprits
from omni_rollout.parity.findings import Finding
from omni_rollout.parity.matrix import Cell
from omni_rollout.parity.probe import CellResult, Probe
from omni_rollout.policy.lora import attach_lora
from omni_rollout.rollout import engine as engine_module
from omni_rollout.rollout import worker
from omni_rollout.rollout.engine import RolloutEngine

PADDED = Cell(dtype="bfloat16", guidance=4.0, width="48", in_flight="3")
NATURAL = replace(PADDED, width="natural")


@pytest.fixture(scope="module")
def sides(checkpoint: str) -> Iterator[Probe]:
    config = TrainConfig()
    config.model.path = checkpoint
    with RolloutEngine(checkpoint, dtype="bfloat16", max_num_seqs=3) as engine:
        yield Probe(engine, load_policy(checkpoint, torch.bfloat16), config)


@dataclass
class Seen:
    result: CellResult
    first: Finding | None


def look(sides: Probe, cell: Cell = PADDED) -> Seen:
    return Seen(sides.cell(cell, 3), sides.first_difference(sides.requests(cell, 3)[2]))


def where(seen: Seen) -> tuple[str, str]:
    assert seen.first is not None
    return seen.first.where, seen.first.name


def wrap_velocity(monkeypatch: pytest.MonkeyPatch, change: Any) -> None:
    """Lets `change(inputs)` alter what the engine, and only the engine, tells its transformer."""
    original = rollout.velocity

    def velocity(network: Network, *args: Any, **kwargs: Any) -> torch.Tensor:
        return original(lambda **inputs: network(**change(inputs)), *args, **kwargs)

    monkeypatch.setattr(rollout, "velocity", velocity)


@pytest.mark.parametrize("cell", [PADDED, NATURAL], ids=["padded", "natural"])
def test_without_a_mutant_nothing_is_reported(sides, cell):
    seen = look(sides, cell)
    assert seen.result.exact and seen.first is None and sides.weights() == []


def test_timestep_cast_before_the_division(sides, monkeypatch):
    def cast(timesteps: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return timesteps.to(dtype) / 1000

    original = rollout.velocity

    def velocity(network: Network, latents: torch.Tensor, timesteps: torch.Tensor, *rest: Any, **more: Any) -> torch.Tensor:
        told = cast(timesteps, torch.bfloat16)

        def misled(**inputs: Any) -> torch.Tensor:
            return network(**{**inputs, "timestep": told.repeat(len(inputs["timestep"]) // len(told))})  # for each branch

        return original(misled, latents, timesteps, *rest, **more)

    monkeypatch.setattr(rollout, "velocity", velocity)
    seen = look(sides)
    assert not seen.result.exact and where(seen) == ("input", "timestep")
    trajectories = list(sides.engine.generate(sides.requests(PADDED, 3)))
    attribution = Attribution(Setting(sides.policy, "qwen_image", torch.bfloat16), "random", "bfloat16", 1e-4)
    found = culprits(attribution.score(trajectories), attribution.causes(trajectories))
    assert [finding.name for finding in found] == ["timestep_cast"]


def test_latents_stored_in_bfloat16(sides, monkeypatch):
    original = QwenImageRolloutPipeline.post_decode

    def post_decode(self: Any, state: Any, **kwargs: Any) -> Any:
        run = state.extra["denoising"]
        run.latents = [latents.bfloat16().float() for latents in run.latents]
        return original(self, state, **kwargs)

    monkeypatch.setattr(QwenImageRolloutPipeline, "post_decode", post_decode)
    seen = look(sides)
    assert not seen.result.exact and where(seen)[0] == "latents" and "bfloat16" in seen.first.what


def test_latents_kept_in_bfloat16_between_steps(sides, monkeypatch):
    original = rollout.sde_step

    def sde_step(velocity: torch.Tensor, sample: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return original(velocity, sample.bfloat16().float(), *args, **kwargs)

    monkeypatch.setattr(rollout, "sde_step", sde_step)
    seen = look(sides)
    assert not seen.result.exact and where(seen)[0] == "step"


def test_sigma_off_by_one(sides, monkeypatch):
    original = rollout.sde_step
    schedule = family_spec.schedule(sides.requests(PADDED, 1)[0].spec, sides.scheduler.config)

    def sde_step(velocity: torch.Tensor, sample: torch.Tensor, sigma: Any, sigma_next: Any, **kwargs: Any) -> Any:
        if kwargs["sde_type"] == "ode":
            return original(velocity, sample, sigma, sigma_next, **kwargs)
        sigmas = schedule.sigmas
        position = min(int((sigmas == sigma).nonzero()) + 1, 4)
        return original(velocity, sample, sigmas[position], sigmas[position + 1], **kwargs)

    monkeypatch.setattr(rollout, "sde_step", sde_step)
    seen = look(sides)
    assert not seen.result.exact and where(seen) == ("step", "step 0") and "step 1" in seen.first.what


def test_a_schedule_of_its_own(sides, monkeypatch):
    original = rollout.RolloutMixin._resolve

    def resolve(self: Any, state: Any) -> Any:
        prompt, spec, _, target = original(self, state)
        larger = replace(spec, height=4 * spec.height, width=4 * spec.width)
        return prompt, spec, family_spec.schedule(larger, self.scheduler.config), target

    with monkeypatch.context() as patch:
        patch.setattr(rollout.RolloutMixin, "_resolve", resolve)
        first = sides.first_difference(sides.requests(PADDED, 1)[0])
    assert first is not None and (first.where, first.name) == ("schedule", "sigmas")


def test_text_trimmed_to_the_longest_prompt(sides, monkeypatch):
    def trimmed(inputs: dict[str, Any]) -> dict[str, Any]:
        mask = inputs["encoder_hidden_states_mask"]
        longest = int(mask.sum(dim=1).max())
        text = inputs["encoder_hidden_states"][:, :longest]
        return {**inputs, "encoder_hidden_states": text, "encoder_hidden_states_mask": mask[:, :longest]}

    wrap_velocity(monkeypatch, trimmed)
    seen = look(sides)
    assert not seen.result.exact and where(seen) == ("input", "encoder_hidden_states")


def test_rope_length_from_the_mask_sum(sides, monkeypatch):
    """With padding, the engine's RoPE refuses a table shorter than the text: no image, and no exit status 0."""
    _mutate_rope_length(sides, monkeypatch, lambda valid, width: valid)
    seen = look(sides)
    assert not seen.result.exact and seen.result.measure is None and len(seen.result.errors) == 3
    assert seen.first is not None and seen.first.where == "engine"


def test_rope_length_from_the_mask_sum_of_an_unpadded_prompt_is_right(sides, monkeypatch):
    """Without padding the sum is the width: the mutant is not a bug there, and must not be reported as one."""
    _mutate_rope_length(sides, monkeypatch, lambda valid, width: valid)
    seen = look(sides, NATURAL)
    assert seen.result.exact and seen.first is None


def test_rope_table_shorter_than_the_text(sides, monkeypatch):
    """What a kernel without a length check does: positions past the valid tokens are not rotated. The mask hides it."""
    original = QwenImageRolloutPipeline.call

    def network(self: Any, *, expert: int, encoder_hidden_states: torch.Tensor, **inputs: Any) -> torch.Tensor:
        valid = int(inputs["encoder_hidden_states_mask"].sum(dim=1).max())
        transformer = self.transformer

        def short(module: Any, args: Any, output: Any) -> Any:
            text = output[2].clone()
            text[valid:] = 1
            return (*output[:2], text)

        handle = transformer.image_rope_prepare.register_forward_hook(short)
        try:
            return original(self, expert=expert, encoder_hidden_states=encoder_hidden_states, **inputs)
        finally:
            handle.remove()

    monkeypatch.setattr(QwenImageRolloutPipeline, "call", network)
    seen = look(sides)
    assert seen.result.measure is not None and seen.result.measure.exact, "masked padding hides it from the KL"
    assert where(seen) == ("module", "transformer_blocks.0.attn RoPE of the text query"), "but not from the trace"


def _mutate_rope_length(sides: Probe, monkeypatch: pytest.MonkeyPatch, length: Any) -> None:
    def network(self: Any, *, expert: int, encoder_hidden_states: torch.Tensor, **inputs: Any) -> torch.Tensor:
        mask = inputs["encoder_hidden_states_mask"]
        rows, width = encoder_hidden_states.shape[:2]
        valid = width if mask is None else int(mask.sum(dim=1).max())
        return self.transformer(
            encoder_hidden_states=encoder_hidden_states,
            txt_seq_lens=[length(valid, width)] * rows,
            guidance=None,
            attention_kwargs={},
            **inputs,
        )[0]

    monkeypatch.setattr(QwenImageRolloutPipeline, "call", network)


def test_mask_dropped_on_one_side(sides, monkeypatch):
    wrap_velocity(monkeypatch, lambda inputs: {**inputs, "encoder_hidden_states_mask": None})
    seen = look(sides)
    assert not seen.result.exact and where(seen) == ("input", "encoder_hidden_states_mask")


def test_mask_kept_on_one_side(sides, monkeypatch):
    """All true, it changes no bit on a CPU; on a GPU it may choose another kernel. So the trace reports it."""

    def kept(inputs: dict[str, Any]) -> dict[str, Any]:
        shape = inputs["encoder_hidden_states"].shape[:2]
        return {**inputs, "encoder_hidden_states_mask": torch.ones(shape, dtype=torch.bool)}

    wrap_velocity(monkeypatch, kept)
    seen = look(sides, NATURAL)
    assert where(seen) == ("input", "encoder_hidden_states_mask")


def test_guidance_combined_in_another_dtype(sides, monkeypatch):
    def in_bfloat16(positive: torch.Tensor, negative: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        low = (negative.bfloat16() + scale.bfloat16().reshape(-1, 1, 1) * (positive.bfloat16() - negative.bfloat16())).float()
        return low * (positive.norm(dim=-1, keepdim=True) / low.norm(dim=-1, keepdim=True))

    original = rollout.velocity

    def velocity(
        network: Network, latents: Any, timesteps: Any, conditions: Any, dtype: Any, *, expert: int = 0
    ) -> torch.Tensor:
        outputs: list[torch.Tensor] = []

        def keeping(**inputs: Any) -> torch.Tensor:
            outputs.append(network(**inputs).float())
            return outputs[-1]

        result = original(keeping, latents, timesteps, conditions, dtype)
        if not conditions[0].guided(expert):
            return result
        if len(outputs) == 1:  # both branches in one pass
            outputs[:] = outputs[0].chunk(2)
        scale = torch.tensor([row.spec.true_cfg_scale for row in conditions])
        assert torch.equal(result, guide(*outputs, scale)), "the mutant must differ from the original in one thing"
        return in_bfloat16(*outputs, scale)

    monkeypatch.setattr(rollout, "velocity", velocity)
    seen = look(sides)
    assert not seen.result.exact and where(seen)[0] == "guidance"


def test_window_shifted_by_one(sides, monkeypatch):
    original = rollout.SamplingSpec.from_json

    def shifted(values: Any) -> Any:
        spec = original(values)
        return replace(spec, step_indices=tuple(index + 1 for index in spec.step_indices))

    requests = [replace(r, spec=replace(r.spec, step_indices=(1, 2))) for r in sides.requests(PADDED, 1)]
    with monkeypatch.context() as patch:
        patch.setattr(rollout.SamplingSpec, "from_json", shifted)
        first = sides.first_difference(requests[0])
    assert first is not None and first.where == "latents" and "window is shifted" in first.what


def test_a_seed_reused_within_a_group(sides, monkeypatch):
    original = engine_module.engine_request
    monkeypatch.setattr(engine_module, "engine_request", lambda request, serial: original(replace(request, seed=5), serial))
    result = sides.cell(PADDED, 3)
    assert result.measure is not None and result.measure.exact, "the recomputation cannot see it"
    assert not result.exact and [finding.where for finding in result.findings] == ["seed"]


def test_stale_weights(sides):
    name, parameter = next(
        (name, p) for name, p in sides.policy.named_parameters() if name == "transformer_blocks.1.attn.to_k.weight"
    )
    before = parameter.detach().clone()
    with torch.no_grad():
        parameter.add_(0.02)
    try:
        seen = look(sides)
        weights = sides.weights()
    finally:
        parameter.data = before
    assert not seen.result.exact
    assert where(seen) == ("module", "transformer_blocks.1.attn.to_k"), "the first layer that computes with them"
    assert [finding.name for finding in weights] == [name]


def test_a_packed_weight_older_than_the_weight(sides, monkeypatch):
    if not any(equal.packed for key, equal in products._equal.items() if torch.bfloat16 in key):
        pytest.skip("on this machine no packed product has a block's bits in this dtype")
    assert look(sides).result.exact, "packs"
    changed = "transformer_blocks.1.attn.to_out.0.weight"
    base = dict(effective_weights(sides.policy, torch.bfloat16))
    sent = {**base, changed: base[changed] + 0.02}
    with monkeypatch.context() as planted:
        planted.setattr(worker, "forget_packed", lambda network: None)
        sides.engine.update_weights(sent.items(), 1)
        assert look(sides).result.exact, "the engine still multiplies by the old one"
    sides.engine.update_weights(sent.items(), 2)
    seen = look(sides)
    assert where(seen) == ("module", "transformer_blocks.1.attn.to_out.0")
    sides.engine.update_weights(base.items(), 3)


def test_one_lora_tensor_dropped(sides, checkpoint):
    adapted = Probe(sides.engine, load_policy(checkpoint, torch.bfloat16), sides.config)
    factors = attach_lora(adapted.policy, rank=2)
    with torch.no_grad():
        for factor in factors:
            factor.add_(0.05 * torch.randn(factor.shape, generator=torch.Generator().manual_seed(3)))
    base = dict(effective_weights(sides.policy, torch.bfloat16))
    dropped = "transformer_blocks.0.attn.to_v.weight"
    sent = {**dict(effective_weights(adapted.policy, torch.bfloat16)), dropped: base[dropped]}
    try:
        sides.engine.update_weights(sent.items(), 1)
        seen = look(adapted)
        weights = adapted.weights()
    finally:
        sides.engine.update_weights(base.items(), 2)
    assert not seen.result.exact and where(seen) == ("module", "transformer_blocks.0.attn.to_v")
    assert [finding.name for finding in weights] == [dropped]


def test_a_strided_projection_shows_only_in_company(sides):
    """The engine's own code slices the joint sequence; rows of one image alone happen to be contiguous."""
    taken: list[tuple[Any, Any]] = []
    for name, layer in sides.engine.pipeline.transformer.named_modules():
        if name.endswith((".to_out", ".to_add_out")):
            taken.append((layer, dict(layer._forward_pre_hooks)))
            layer._forward_pre_hooks.clear()
            layer.quant_method, kept = _PlainLinear(), layer.quant_method
            taken[-1] = (layer, (taken[-1][1], kept))
    try:
        # Natural widths keep rows of different prompts apart: only a fixed width brings company.
        result = sides.cell(PADDED, 3)
    finally:
        for layer, (hooks, method) in taken:
            layer._forward_pre_hooks.update(hooks)
            layer.quant_method = method
    assert taken and not result.exact


class _PlainLinear:
    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return torch.nn.functional.linear(x, layer.weight, bias)


def test_the_suite_left_no_mutant_behind(sides):
    assert look(sides).result.exact and Path(sides.config.model.path).exists()
