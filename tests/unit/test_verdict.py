"""What a run came to, whether its reward collapsed, how far it went, and what is said before it starts: by hand."""

from __future__ import annotations

import math
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pytest
import torch

from omni_rollout.cli import main
from omni_rollout.config import TrainConfig
from omni_rollout.launch.compose import compose
from omni_rollout.monitor.collapse import reward_collapsed, run_lost
from omni_rollout.monitor.verdict import verdict
from omni_rollout.policy.drift import SAMPLED, Drift
from omni_rollout.run.before import check_before, header
from omni_rollout.run.evaluation import evaluation_metrics


def lines(rewards: Sequence[float], std: float = 0.3) -> list[dict[str, float]]:
    return [
        {"step": step, "critic/rewards/mean": reward, "critic/rewards/std": std, "parity/bitwise_equal_fraction": 1.0}
        for step, reward in enumerate(rewards, start=1)
    ]


def test_the_verdict_by_hand() -> None:
    run = lines([0.5, 0.54, *[0.6] * 16, 0.7, 0.74])
    run[3]["parity/bitwise_equal_fraction"] = 0.5
    held_out = [{"evaluation/reward": 0.4, "evaluation/reward_se": 0.03, "evaluation/exact_match": 0.42, "step": 0}]
    run[-1] |= {"evaluation/reward": 0.8, "evaluation/reward_se": 0.04, "evaluation/exact_match": 0.9}
    told = dict(verdict([*held_out, *run]))
    error = math.hypot(stdev([0.5, 0.54]), stdev([0.7, 0.74])) / math.sqrt(2)
    assert told == {
        "reward": f"0.520 -> 0.720 in training, first against last 2 steps of 20: +0.200 +- {error:.3f} (standard error)",
        "held-out": "0.400 -> 0.800, step 0 against step 20: +0.400 +- 0.050 (standard error); exact_match 0.420 -> 0.900",
        "parity": "engine and trainer agreed bit for bit in 19 of 20 steps",
    }


def test_a_verdict_leaves_out_what_was_no_number_on_one_side() -> None:
    first = {"step": 0, "evaluation/reward": 0.4, "evaluation/reward_se": 0.0, "evaluation/ocr": None, "evaluation/color": 0.5}
    last = {"step": 3, "evaluation/reward": 0.6, "evaluation/reward_se": 0.0, "evaluation/ocr": 0.5, "evaluation/color": 0.7}
    told = dict(verdict([first, *lines([0.6, 0.7]), last]))["held-out"]
    assert "color 0.500 -> 0.700" in told and "ocr" not in told


def test_a_verdict_does_not_call_noise_a_gain() -> None:
    told = dict(verdict([{"step": 0, "evaluation/reward": 0.42, "evaluation/reward_se": 0.03}, *lines([0.6, 0.7])]))
    assert told["reward"].endswith("first against last step of 2: too few to tell") and "held-out" not in told
    after = {"step": 3, "evaluation/reward": 0.45, "evaluation/reward_se": 0.03}
    told = dict(verdict([{"step": 0, "evaluation/reward": 0.42, "evaluation/reward_se": 0.03}, after]))
    assert told["held-out"].endswith("+0.030 +- 0.042 (standard error), no more than chance")
    assert not dict(verdict([]))


def test_an_evaluation_has_its_standard_error() -> None:
    rewards = [0.0, 1.0, 1.0, 0.5]
    metrics = evaluation_metrics(rewards, {"ocr": 0.6})
    assert metrics == {
        "evaluation/ocr": 0.6,
        "evaluation/reward": fmean(rewards),
        "evaluation/reward_se": pytest.approx(stdev(rewards) / 2),
    }
    assert evaluation_metrics([0.3], {})["evaluation/reward_se"] == 0.0


@pytest.fixture
def config() -> TrainConfig:
    return compose(["model=nano", "prompts=p.txt", "rollout.prompts_per_step=4"])


def fired(rewards: Sequence[float], config: TrainConfig, std: float = 0.3) -> list[int]:
    run = lines(rewards, std)
    return [line["step"] for place, line in enumerate(run) for _ in reward_collapsed(line["step"], line, run[:place], config)]


def test_a_reward_that_collapses_is_told(config: TrainConfig) -> None:
    run = lines([0.69])
    (alert,) = reward_collapsed(2, lines([0.69, 0.05], std=0.1)[1], run, config)
    assert alert.name == "reward_collapsed" and "trainer.learning_rate=1e-05" in alert.command
    assert "0.050 over the latest 1 steps, 0.690 over the best 1 before them" in alert.sentence
    assert fired([0.6, 0.62, 0.7, 0.72, 0.75, 0.74, 0.5, 0.3, 0.1, 0.05], config) == [10]


def test_noise_between_prompts_is_no_collapse(config: TrainConfig) -> None:
    """100 runs of 80 steps whose reward is level, or rises, with the spread that steps of 4 prompts have."""
    generator = random.Random(0)
    false = 0
    for run in range(100):
        slope = 0.002 if run % 2 else 0.0
        false += bool(fired([0.6 + slope * step + generator.gauss(0, 0.3 / 2) for step in range(80)], config))
    assert false <= 8, "each run is looked at 79 times, against the best stretch so far"


def test_the_drift_is_the_relative_distance_of_the_weights() -> None:
    generator = torch.Generator().manual_seed(0)
    start = {"small": torch.randn(7, 5, generator=generator), "large": torch.randn(300, 200, generator=generator)}
    drift = Drift(start.items())
    assert drift.value == 0.0
    moved = {name: tensor * 1.01 for name, tensor in start.items()}
    passed = dict(drift.watch(moved.items()))
    assert all(passed[name] is moved[name] for name in moved)
    assert drift.value == pytest.approx(0.01, rel=1e-4)
    noisy = {name: tensor + 0.1 * torch.randn(tensor.shape, generator=generator) for name, tensor in start.items()}
    list(drift.watch(noisy.items()))
    whole = math.sqrt(sum((noisy[name] - start[name]).square().sum().item() for name in start))
    assert drift.value == pytest.approx(whole / math.sqrt(sum(t.square().sum().item() for t in start.values())), rel=0.05)
    assert all(len(sample) <= SAMPLED for sample in drift._start.values())
    list(drift.watch(start.items()))
    assert drift.value == 0.0


def test_the_header_says_what_is_going_to_be_trained(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text('a "1"\na "2"\n')
    words = ["model=nano", f"prompts={tmp_path}/p.txt", "sampling.seed=7", "trainer.steps=3", "trainer.lora_rank=16"]
    config = compose([*words, "trainer.learning_rate=1e-3", f"run_dir={tmp_path}/run", "rollout.prompts_per_step=4"])
    text = "\n".join(header(config, check_before(config)))
    for told in (
        "LoRA of rank 16 of ",
        "2 prompts; a step takes more prompts than there are, so they repeat",
        "4 prompts x 8 images = 32: 64x64, 10 steps",
        "learning rate 0.001 after 5 steps of warm-up (these 3 reach 0.0006)",
        "evaluation  none",
        f"3 steps, seed 7, into {tmp_path}/run; saved at the end",
    ):
        assert told in text, text


@pytest.mark.parametrize(
    ("words", "status", "told"),
    [
        (["prompts={0}/empty.txt"], 2, "holds no prompts"),
        (["prompts={0}/silent.txt"], 2, "names no text to read"),
        (["run_dir={0}/taken"], 2, "holds a run already"),
        (["trainer.resume={0}/nowhere"], 2, "does not exist: expected the folder of a checkpoint"),
        (["gpus=8x80"], 2, "give dry_run=true too"),
        (["dry_run=perhaps"], 2, "expected true or false"),
    ],
)
def test_what_is_wrong_is_told_before_torch_is_loaded(words: list[str], status: int, told: str, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "silent.txt").write_text("a cat\n")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "metrics.jsonl").write_text("{}\n")
    given = ["train", "experiment=nano_ocr", f"run_dir={tmp_path}/new", *(word.format(tmp_path) for word in words)]
    code = f"import sys; from omni_rollout.cli import main; print(main({given!r}), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith(f"{status} False\n") and told in done.stdout + done.stderr
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("words", "status", "told"),
    [
        (["gpus=1x1"], 1, "on one GPU of 1 GiB: does not fit"),
        (["gpus=1x80"], 0, "on one GPU of 80 GiB: fits"),
        ([], 0, "as they should be; no policy was loaded, nothing written"),
        (["model.path=elsewhere"], 2, "elsewhere"),
        (["collate.prompt_width=3"], 2, "the fixed width is 3: shorten it, or set collate.prompt_width="),
    ],
)
def test_a_dry_run_says_what_would_be_and_writes_nothing(
    words: list[str], status: int, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "experiment=nano_ocr", f"run_dir={tmp_path}/new", "dry_run=true", *words]) == status
    captured = capsys.readouterr()
    assert told in captured.out + captured.err
    assert not (tmp_path / "new").exists()


def test_a_wrong_run_is_told_in_this_process_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "broken.jsonl").write_text('{"prompt": "a 1"\n')
    assert main(["train", "experiment=nano_ocr", f"prompts={tmp_path}/broken.jsonl", f"run_dir={tmp_path}/new"]) == 2
    assert "line 1: not JSON" in capsys.readouterr().err


def alerts_of(run: Sequence[dict[str, Any]], config: TrainConfig) -> list[tuple[int, str]]:
    return [
        (line["step"], alert.name)
        for place, line in enumerate(run)
        for alert in run_lost(line["step"], line, run[:place], config)
    ]


def test_a_held_out_reward_that_falls_is_told(config: TrainConfig) -> None:
    """As of a run with a learning rate of 50, whose training reward fell too early for its noise to be known."""
    said = {"step": 0, "evaluation/reward": 0.719, "evaluation/reward_se": 0.063}
    lost = {"step": 15, "evaluation/reward": 0.0, "evaluation/reward_se": 0.0}
    assert alerts_of([said, lost], config) == [(15, "held_out_collapsed")]
    (alert,) = run_lost(15, lost, [said], config)
    assert "0.000, it was 0.719 at step 0; the difference is 11.4 standard errors" in alert.sentence
    worse = {"step": 15, "evaluation/reward": 0.5, "evaluation/reward_se": 0.06}
    assert alerts_of([said, worse], config) == [], "2.5 standard errors are chance"
    assert alerts_of([said, {"step": 15, "evaluation/reward": None}, {**worse, "step": 30}], config) == []
    one_image = [{"step": step, "evaluation/reward": 2.4 - step, "evaluation/reward_se": 0.0} for step in (0, 1)]
    assert alerts_of(one_image, config) == [], "of one image no error is known"


def test_weights_that_went_away_are_told(config: TrainConfig) -> None:
    run = [{"step": 1, "actor/drift": 0.02}, {"step": 2, "actor/drift": 2.9e5}]
    assert alerts_of(run, config) == [(2, "drifted_away")]
    assert alerts_of([{"step": 1, "actor/drift": None}], config) == []
