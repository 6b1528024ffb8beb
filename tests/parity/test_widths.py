"""`collate.width`: prompts as wide as they are, or as the next bucket is, sampled together and scored bit for bit."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoTokenizer

from omni_rollout.config import CollateConfig, SamplingConfig, Width
from omni_rollout.data.collate import Collator
from omni_rollout.types import Prompt
from tests.parity.conftest import PROMPTS, Sides


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_each_width_is_exact_and_no_choice_costs_another_its_bits(sides: Sides, scale: float) -> None:
    tokenizer = AutoTokenizer.from_pretrained(sides.checkpoint, subfolder="tokenizer")
    sampling = SamplingConfig(height=64, width=64, num_inference_steps=5, true_cfg_scale=scale)
    requests, widths = [], {}
    for number, kind in enumerate(Width, start=1):
        made = Collator("qwen_image", tokenizer, sampling, CollateConfig(prompt_width=48, width=kind))
        asked = made.groups([Prompt(text=text) for text in PROMPTS], number, 2)
        requests += asked
        widths[kind] = {request.spec.prompt_width for request in asked}
    assert widths[Width.fixed] == {48} and len(widths[Width.natural]) > 2
    trajectories = list(sides.engine.generate(requests))
    for trajectory in trajectories:
        assert len(trajectory.prompt_embeds_mask) == trajectory.spec.prompt_width
    natural = [one for one in trajectories if one.group_id.startswith("00003")]
    assert len(natural) == 8 and all(bool(one.prompt_embeds_mask.all()) for one in natural), "nothing is padded"
    for one, scored in zip(trajectories, sides.score(trajectories), strict=True):
        assert torch.equal(one.log_probs, scored)
