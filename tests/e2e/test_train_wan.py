"""A window that one expert of two has no step in: the other stays what it was, and every step is exact all the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from diffusers import WanTransformer3DModel

from omni_rollout.launch.compose import compose
from omni_rollout.nano.random_weights import build_random
from omni_rollout.train import train

EXPERTS = ("transformer", "transformer_2")


@pytest.mark.parametrize(("window", "trained"), [("[0,1]", 0), ("[3,4]", 1)])
def test_an_expert_without_a_step_in_the_window_stays_where_it_is(window: str, trained: int, tmp_path: Path) -> None:
    build_random(tmp_path / "model", family="wan2_2", seed=1)
    (tmp_path / "prompts.txt").write_text("a red cat moving left\na blue dog on a table\n")
    overrides = [
        "model.family=wan2_2",
        f"model.path={tmp_path / 'model'}",
        "model.dtype=bfloat16",
        f"prompts={tmp_path / 'prompts.txt'}",
        f"run_dir={tmp_path / 'run'}",
        "collate.prompt_width=24",
        "sampling.height=32",
        "sampling.width=48",
        "sampling.num_inference_steps=5",
        "sampling.true_cfg_scale=2.0",
        "sampling.extra={frames: 5, flow_shift: 3.0, true_cfg_scale_2: 1.0}",
        f"sampling.sde_window_range={window}",
        "reward=motion",
        "rollout.group_size=3",
        "rollout.prompts_per_step=2",
        "trainer.steps=2",
        "trainer.learning_rate=1e-3",
        "trainer.weight_decay=0.1",
        "wandb.mode=disabled",
    ]
    train(compose(overrides))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [(line["parity/ppo_kl_mb0"], line["parity/bitwise_equal_fraction"]) for line in lines if line["step"]] == [
        (0, 1)
    ] * 2
    (saved,) = (tmp_path / "run" / "checkpoints").glob("step_*")
    for place, name in enumerate(EXPERTS):
        before = WanTransformer3DModel.from_pretrained(tmp_path / "model", subfolder=name).state_dict()
        after = WanTransformer3DModel.from_pretrained(saved / name).state_dict()
        moved = [key for key in before if not (after[key] == before[key]).all()]
        assert len(moved) == (len(before) if place == trained else 0)
