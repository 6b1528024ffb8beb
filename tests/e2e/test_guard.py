"""A rollout whose log-probs are not the trainer's, planted in the real engine: what each setting makes of it."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from omni_rollout.config import TrainerConfig
from omni_rollout.errors import WeightSyncError
from omni_rollout.launch.compose import compose
from omni_rollout.models.base import rollout
from omni_rollout.monitor import MismatchError, Monitor, last_words
from omni_rollout.policy.trainer_engines import make_trainer_engine
from omni_rollout.rewards import RewardError
from omni_rollout.train import train

SHIFT = 1e-3
DOCUMENTED = Path(__file__).parents[2] / "docs" / "metrics.md"


@pytest.fixture
def shifted(monkeypatch: pytest.MonkeyPatch) -> None:
    original = rollout.sde_step

    def shift(*args: Any, **kwargs: Any) -> Any:
        step = original(*args, **kwargs)
        return replace(step, log_prob=step.log_prob + SHIFT)

    monkeypatch.setattr(rollout, "sde_step", shift)


def overrides(checkpoint: Path, folder: Path, *more: str) -> list[str]:
    (folder / "prompts.txt").write_text("a red cat\na blue dog on a table\n")
    return [
        f"model.path={checkpoint}",
        f"prompts={folder / 'prompts.txt'}",
        f"run_dir={folder / 'run'}",
        "collate.prompt_width=24",
        "sampling.height=32",
        "sampling.width=32",
        "sampling.num_inference_steps=4",
        "sampling.true_cfg_scale=1.0",
        "reward=jpeg_compressibility",
        "rollout.group_size=4",
        "rollout.prompts_per_step=2",
        "trainer.steps=2",
        "trainer.clip_range=1e-4",
        "wandb.mode=disabled",
        *more,
    ]


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


def documented(key: str) -> bool:
    names = re.findall(r"^\| `([^`]+)`", DOCUMENTED.read_text(encoding="utf-8"), re.MULTILINE)
    return any(re.fullmatch(re.sub(r"\\\{\w+\\\}", ".+", re.escape(name)), key) for name in names)


@pytest.mark.usefixtures("shifted")
def test_alert_says_it_everywhere_and_goes_on(random_checkpoint, tmp_path, capsys):
    train(compose(overrides(random_checkpoint, tmp_path, "wandb.mode=offline")))
    steps = lines(tmp_path)
    assert [line["step"] for line in steps] == [1, 2]
    for line in steps:
        assert line["parity/ppo_kl_mb0"] == pytest.approx(SHIFT, rel=1e-3)
        assert line["parity/bitwise_equal_fraction"] < 0.5
        assert line["actor/pg_clipfrac_mb0"] == 1.0, "the ratio is taken to the rollout's log-probs, wrong as they are"
        assert line["alerts"] == 2 and line["alerts/names"] == "kl_nonzero, ratio_leans"
        assert line["actor/ppo_kl/compares"] == "rollout engine against trainer"
        assert line["actor/old_log_probs_recomputed"] == 0
        assert [key for key in line if not documented(key)] == []
    assert steps[0]["weights/digest"] != steps[1]["weights/digest"]
    printed = capsys.readouterr().out
    assert printed.count("Find it with: omni-rollout parity model.path=") == 2, "each kind is spelled out once"
    assert "ALERT kl_nonzero (2 steps so far)" in printed
    assert "kl_nonzero in 2 steps, ratio_leans in 2 steps" in printed
    assert (tmp_path / "run" / "images" / "parity_heatmap.png").is_file()
    # The file holds the console's lines as well, which are indented.
    (stored,) = (tmp_path / "run").glob("wandb/offline-run-*/*.wandb")
    sent = stored.read_bytes()
    assert sent.count(b"\nProbable cause: ") == 2 and b"parity/what_is_compared" in sent


@pytest.mark.usefixtures("shifted")
def test_recompute_takes_the_ratio_to_the_trainers_own(random_checkpoint, tmp_path):
    train(compose(overrides(random_checkpoint, tmp_path, "monitor.on_mismatch=recompute", "rollout.max_num_seqs=3")))
    for line in lines(tmp_path):
        assert line["parity/ppo_kl_mb0"] == pytest.approx(SHIFT, rel=1e-3)
        assert line["actor/pg_clipfrac_mb0"] == 0 and line["actor/ppo_kl"] == 0 and line["actor/ratio_mean"] == 1
        assert line["alerts/names"] == "kl_nonzero"
        assert line["actor/ppo_kl/compares"] == "trainer against itself"
        assert line["actor/old_log_probs_recomputed"] == 1
        assert line["actor/grad_norm"] > 0


def test_stop_lets_equal_log_probs_pass_and_ends_before_the_first_wrong_update(random_checkpoint, tmp_path, monkeypatch):
    original = rollout.sde_step
    drawn = []

    def shift_in_step_two(*args: Any, **kwargs: Any) -> Any:
        step = original(*args, **kwargs)
        drawn.append(len(step.log_prob))
        return replace(step, log_prob=step.log_prob + SHIFT) if sum(drawn) > 8 * 4 else step

    monkeypatch.setattr(rollout, "sde_step", shift_in_step_two)
    with pytest.raises(MismatchError, match=r"step 2: 100% of .* gap is 1\.0e-03 \(10 clip ranges\).*omni-rollout parity"):
        train(compose(overrides(random_checkpoint, tmp_path, "monitor.on_mismatch=stop")))
    first, second = lines(tmp_path)
    assert first["parity/bitwise_equal_fraction"] == 1.0 and first["alerts"] == 0
    assert second["alerts/names"] == "kl_nonzero" and "parity=exact promises equal bits" in second["stopped"]
    assert "actor/grad_norm" not in second, "no update was made"
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_the_last_words_of_a_run_are_in_its_metrics(tmp_path, capsys):
    config = compose(overrides(tmp_path, tmp_path))
    for step, error in enumerate((WeightSyncError("weight a.b: different there"), RewardError("ocr: the reward is nan")), 1):
        with pytest.raises(type(error)), Monitor(tmp_path / "run", config, 2) as sight, last_words(sight, step):
            raise error
    weights, reward = lines(tmp_path)
    assert (weights["alerts/names"], weights["weights/difference"]) == ("weights_differ", "weight a.b: different there")
    assert (reward["step"], reward["alerts/names"]) == (2, "reward_failed")
    assert "ALERT weights_differ, step 1: weight a.b: different there" in capsys.readouterr().out


def test_a_nan_of_the_policy_changes_no_weight():
    layer = torch.nn.Linear(2, 1, bias=False)
    before = layer.weight.detach().clone()
    engine = make_trainer_engine(TrainerConfig(weight_decay=0.1), layer, list(layer.parameters()))
    engine.backward((layer(torch.ones(2)) * torch.nan).sum(), last=True)
    assert torch.isnan(torch.tensor(engine.step(1e-2))) and torch.equal(layer.weight, before)
