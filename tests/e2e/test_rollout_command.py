"""`omni-rollout rollout` in a process of its own; its capsules are then scored here."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer

from omni_rollout.data.collate import Collator
from omni_rollout.data.prompts import load_prompts
from omni_rollout.errors import UserError
from omni_rollout.launch.compose import compose
from omni_rollout.models.qwen_image.policy import load_policy
from omni_rollout.nano.random_weights import build_random
from omni_rollout.policy.recompute import recompute
from omni_rollout.rollout.engine import RolloutEngine
from omni_rollout.trajectories.capsule import load_capsule

LINES = ["a red cat", "a red cat and a blue dog " * 10, "a blue dog"]


@pytest.fixture(scope="module")
def rolled_out(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str], subprocess.CompletedProcess[str]]:
    folder = tmp_path_factory.mktemp("rollout")
    build_random(folder / "model", seed=2)
    (folder / "prompts.txt").write_text("\n".join(LINES))
    overrides = [
        f"model.path={folder / 'model'}",
        f"prompts={folder / 'prompts.txt'}",
        "model.dtype=bfloat16",
        "collate.prompt_width=24",
        "sampling.height=64",
        "sampling.width=64",
        "sampling.num_inference_steps=5",
        "sampling.true_cfg_scale=3.0",
        "rollout.group_size=2",
    ]
    command = [sys.executable, "-m", "omni_rollout.cli", "rollout", *overrides, f"out={folder / 'out'}"]
    return folder, overrides, subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def test_a_prompt_past_the_width_is_refused_and_the_others_are_made(rolled_out):
    folder, _, done = rolled_out
    assert done.returncode == 1
    assert "the fixed width is 24" in done.stderr and "collate.prompt_width=" in done.stderr
    capsules, images = sorted((folder / "out").glob("*.safetensors")), sorted((folder / "out").glob("*-*.png"))
    assert len(capsules) == len(images) == 4
    assert [path.stem for path in capsules] == [path.stem for path in images]
    assert {load_capsule(path).prompt.text for path in capsules} == {LINES[0], LINES[2]}
    assert Image.open(images[0]).size == (64, 64)


def test_capsules_of_another_process_hold_here(rolled_out):
    folder, _, _ = rolled_out
    trajectories = [load_capsule(path) for path in sorted((folder / "out").glob("*.safetensors"))]
    policy = load_policy(str(folder / "model"), torch.bfloat16)
    scored = recompute(policy, trajectories, family="qwen_image", dtype=torch.bfloat16, micro_batch_size=3)
    assert all(torch.equal(ours, trajectory.log_probs) for ours, trajectory in zip(scored, trajectories, strict=True))


def test_this_process_samples_the_same_bits(rolled_out):
    folder, overrides, _ = rolled_out
    config = compose(overrides)
    tokenizer = AutoTokenizer.from_pretrained(config.model.path, subfolder="tokenizer")
    collator = Collator("qwen_image", tokenizer, config.sampling, config.collate)
    prompts = load_prompts(config.prompts)
    requests = [request for position in (0, 2) for request in collator.groups([prompts[position]], position, 2)]
    with RolloutEngine(config.model.path, dtype="bfloat16", max_num_seqs=3) as engine:
        with pytest.raises(UserError, match=r"there is room for one: close\(\) it before making another"):
            RolloutEngine(config.model.path)
        for trajectory in engine.generate(requests):
            other = load_capsule(folder / "out" / f"{trajectory.request_id}.safetensors")
            assert torch.equal(trajectory.latents, other.latents)
            assert (trajectory.image == other.image).all()
            assert trajectory.fingerprint["weights"] == other.fingerprint["weights"]
