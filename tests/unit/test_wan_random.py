"""Random checkpoints of Wan2.2: the bytes of a seed, two experts that differ, and stock diffusers takes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanImageToVideoPipeline, WanPipeline

from omni_rollout.errors import UserError
from omni_rollout.launch import model_files
from omni_rollout.nano.random_weights import build_random

FAMILIES = {"wan2_2": (WanPipeline, 16, 0.875), "wan2_2_i2v": (WanImageToVideoPipeline, 36, 0.9)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("random")


@pytest.mark.parametrize("family", FAMILIES)
def test_stock_diffusers_takes_it(family, folder):
    path = build_random(folder / family, family=family, seed=2)
    assert not list(model_files.problems(path, family))
    pipeline_class, channels, boundary = FAMILIES[family]
    pipeline: Any = pipeline_class.from_pretrained(path)
    assert pipeline.config.boundary_ratio == boundary and pipeline.transformer.config.in_channels == channels
    first, second = pipeline.transformer.state_dict(), pipeline.transformer_2.state_dict()
    assert first.keys() == second.keys() and not any(torch.equal(first[name], second[name]) for name in first)
    assert len(pipeline.tokenizer('a red cat, "xyz"').input_ids) > 5 and pipeline.tokenizer("").input_ids == [1]
    if family == "wan2_2":
        pipeline.set_progress_bar_config(disable=True)
        sizes = {"height": 32, "width": 48, "num_frames": 5, "num_inference_steps": 2, "max_sequence_length": 12}
        frames = pipeline("a red cat", **sizes, output_type="np").frames
        assert frames.shape == (1, 5, 32, 48, 3)


def test_a_seed_has_its_bytes(folder):
    one, same, other = (build_random(folder / str(n), family="wan2_2_i2v", seed=seed) for n, seed in enumerate((5, 5, 6)))
    files = sorted(path.relative_to(one) for path in one.rglob("*") if path.is_file())
    assert len(files) > 8 and all((one / file).read_bytes() == (same / file).read_bytes() for file in files)
    weights = [file for file in files if file.suffix == ".safetensors"]
    assert not any((one / file).read_bytes() == (other / file).read_bytes() for file in weights)


@pytest.mark.parametrize("head_dim", [8, 16, 33, 40, 64])
def test_heads_that_the_two_sides_would_share_out_differently_are_refused(head_dim, folder):
    with pytest.raises(UserError, match=f"head_dim={head_dim}: Wan2.2 expects"):
        build_random(folder / "refused", family="wan2_2", head_dim=head_dim)
