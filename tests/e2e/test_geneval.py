"""A step of training on GenEval's own file, with tiny random models of the real classes, through the real engine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from omni_rollout.cli import main
from omni_rollout.launch.compose import compose
from omni_rollout.train import train
from tests.unit.test_geneval import ROWS, few
from tests.unit.test_reward_models import clip

__all__ = ["clip", "few"]  # the fixtures


@pytest.fixture
def given(few: Path, clip: Path, tmp_path: Path) -> list[str]:
    file = tmp_path / "evaluation_metadata.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    small = [
        "collate.prompt_width=48",
        "rollout.group_size=4",
        "rollout.prompts_per_step=2",
        "sampling.num_inference_steps=5",
        "evaluation.images=6",
    ]
    recipe = ["experiment=nano_ocr", "trainer.steps=1", "wandb.mode=disabled", f"run_dir={tmp_path / 'run'}", *small]
    reward = ["reward=geneval", f"reward.model.geneval={few}+{clip}"]
    return [*recipe, *reward, f"prompts={file}", f"evaluation.prompts={file}"]


def test_a_row_that_cannot_be_scored_is_refused_before_the_engine_starts(
    given: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", *given, "dry_run=true"]) == 0
    assert "geneval" in capsys.readouterr().out
    wrong = tmp_path / "wrong.jsonl"
    wrong.write_text(json.dumps(ROWS[0]) + "\n" + json.dumps({**ROWS[0], "include": [{"class": "zebra", "count": 1}]}) + "\n")
    assert main(["train", *given[:-2], f"prompts={wrong}", "dry_run=true"]) == 2
    assert "geneval: prompt 'a photo of a dog': `include`[0]: the detector knows no 'zebra'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_step(given: list[str], tmp_path: Path) -> None:
    train(compose(given))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    (step,) = [line for line in lines if "critic/rewards/geneval/mean" in line]
    assert 0 < step["critic/rewards/geneval/mean"] < 1 and step["critic/rewards/failed"] == 0
    assert step["parity/bitwise_equal_fraction"] == 1.0 and step["actor/grad_norm"] > 0
    for line in (line for line in lines if "evaluation/geneval" in line):
        assert 0 < line["evaluation/geneval"] <= 1 and 0 <= line["evaluation/geneval_strict"] <= 1
    assert sum("evaluation/geneval_strict" in line for line in lines) == 2, "before and after"
