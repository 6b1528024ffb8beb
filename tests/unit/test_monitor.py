from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from omni_rollout.config import TrainConfig
from omni_rollout.errors import RunFailedError
from omni_rollout.monitor import Monitor, NotFiniteError, check_finite, parity_metrics, ratio_metrics, reward_metrics
from omni_rollout.monitor.console import step_line
from omni_rollout.monitor.heatmap import heat_map
from omni_rollout.monitor.wandb_sink import has_key
from omni_rollout.trajectories.sheet import image_grid

STEPS = torch.tensor([[0, 1], [1, 2]])


@pytest.fixture
def config(monkeypatch: pytest.MonkeyPatch) -> TrainConfig:
    """wandb is off; a key of the machine that runs the tests is out of sight."""
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("NETRC", "/nowhere")
    config = TrainConfig(prompts="p.txt", run_dir="unused")
    config.model.path, config.wandb.mode = "model", "disabled"
    return config


def test_equal_log_probs_are_exactly_zero_everywhere() -> None:
    log_probs = torch.randn(2, 2)
    metrics = parity_metrics(log_probs, log_probs.clone(), STEPS, elements=1024, clip_range=1e-4)
    assert metrics.pop("parity/bitwise_equal_fraction") == 1.0
    assert set(metrics.values()) == {0.0}


def test_parity_by_hand() -> None:
    rollout = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    trainer = torch.tensor([[0.75, 2.0], [3.5, 4.0]])  # differences 1/4, 0, -1/2, 0
    metrics = parity_metrics(rollout, trainer, STEPS, elements=8, clip_range=0.25)
    k3 = (math.exp(-0.25) - 1 + 0.25 + math.exp(0.5) - 1 - 0.5) / 4
    assert metrics.pop("rollout_corr/k3_kl") == pytest.approx(k3, rel=1e-12)
    assert metrics == {
        "parity/ppo_kl_mb0": -0.0625,
        "parity/kl_nats": -0.5,
        "parity/over_clip": 2.0,
        "parity/bitwise_equal_fraction": 0.5,
        "rollout_corr/kl": -0.0625,
        "rollout_corr/logprob_abs_diff_mean": 0.1875,
        "rollout_corr/logprob_abs_diff_max": 0.5,
        "rollout_corr/logprob_abs_diff/ts_0": 0.25,
        "rollout_corr/logprob_abs_diff/ts_1": 0.25,  # of 0 and 1/2
        "rollout_corr/logprob_abs_diff/ts_2": 0.0,
    }


def test_differences_that_cancel_in_the_kl_are_seen_by_the_others() -> None:
    metrics = parity_metrics(torch.tensor([[1.0, 2.0]]), torch.tensor([[2.0, 1.0]]), torch.tensor([[0, 1]]), 8, 1.0)
    assert metrics["parity/ppo_kl_mb0"] == 0.0
    assert metrics["parity/bitwise_equal_fraction"] == 0.0 and metrics["rollout_corr/k3_kl"] > 0.5
    assert metrics["parity/over_clip"] == 1.0


@given(st.lists(st.floats(-4, 4, width=32), min_size=4, max_size=4), st.integers(0, 3), st.integers(1, 3))
@settings(deadline=None, max_examples=50)
def test_one_bit_in_one_log_prob_is_seen(values: list[float], where: int, units: int) -> None:
    rollout = torch.tensor(values).reshape(2, 2)
    bits = rollout.clone().view(torch.int32).flatten()
    bits[where] += units
    trainer = bits.view(torch.float32).reshape(2, 2)
    metrics = parity_metrics(rollout, trainer, STEPS, elements=1024, clip_range=1e-4)
    assert metrics["parity/bitwise_equal_fraction"] == 0.75
    assert metrics["rollout_corr/logprob_abs_diff_max"] > 0 and metrics["parity/ppo_kl_mb0"] != 0


def test_a_zero_of_the_other_sign_has_other_bits_and_nan_is_not_hidden() -> None:
    zero = torch.zeros(2, 2)
    assert parity_metrics(zero, -zero, STEPS, 8, 1.0)["parity/bitwise_equal_fraction"] == 0.0
    broken = parity_metrics(zero, zero + torch.tensor([[math.nan, 0], [0, 0]]), STEPS, 8, 1.0)
    assert math.isnan(broken["parity/ppo_kl_mb0"]) and math.isnan(broken["parity/over_clip"])


def test_parity_refuses_what_it_cannot_compare() -> None:
    log_probs = torch.zeros(2, 2)
    with pytest.raises(ValueError, match="shapes"):
        parity_metrics(log_probs, torch.zeros(2, 3), STEPS, 8, 1.0)
    with pytest.raises(ValueError, match="step_indices"):
        parity_metrics(log_probs, log_probs, STEPS[:1], 8, 1.0)
    with pytest.raises(ValueError, match=r"rollout_log_probs is torch\.bfloat16: expected float32"):
        parity_metrics(log_probs.bfloat16(), log_probs, STEPS, 8, 1.0)


def test_ratios_by_hand() -> None:
    old = torch.zeros(4)
    new = torch.tensor([0.5, 1.25, 0.75, 1.0]).log()
    metrics = ratio_metrics(new, old, clip_range=0.2)
    assert metrics["actor/ratio_mean"] == pytest.approx(0.875, rel=1e-6)
    assert metrics["actor/ratio_std"] == pytest.approx(np.std([0.5, 1.25, 0.75, 1.0]), rel=1e-6)
    assert metrics["actor/ppo_kl"] == pytest.approx(-new.double().mean().item(), rel=1e-12)
    assert (metrics["actor/pg_clipfrac_higher"], metrics["actor/pg_clipfrac_lower"]) == (0.25, 0.5)
    assert metrics["actor/pg_clipfrac"] == 0.75


def test_an_unmoved_policy_has_ratio_exactly_one() -> None:
    log_probs = torch.randn(3, 5, requires_grad=True)
    metrics = ratio_metrics(log_probs, log_probs.detach(), clip_range=1e-5)
    assert metrics["actor/ratio_mean"] == 1.0
    assert all(value == 0 for key, value in metrics.items() if key != "actor/ratio_mean")


def test_rewards_by_hand() -> None:
    metrics = reward_metrics([0.0, 1.0, 0.3, 0.3, 0.3], ["a", "a", "b", "b", "b"], {"ocr": [0, 0, 0, 0, 1]})
    assert metrics["critic/rewards/mean"] == pytest.approx(0.38)
    assert metrics["critic/rewards/std_mean"] == pytest.approx(0.25)  # of 1/2 and 0
    assert metrics["critic/rewards/zero_std_ratio"] == 0.5
    assert metrics["critic/rewards/ocr/mean"] == pytest.approx(0.2)
    with pytest.raises(ValueError, match="2 rewards and 1 group ids"):
        reward_metrics([0.0, 1.0], ["a"], {})


def test_the_line_says_exact_zero_only_for_exact_zero() -> None:
    assert step_line(
        {"critic/rewards/mean": 0.52, "parity/ppo_kl_mb0": 0.0, "actor/pg_clipfrac": 0.0, "timing_s/step": 4.0}
    ) == ("reward 0.520  engine-trainer gap 0.0  clip 0.00")
    assert "gap 0.0 (max 1.2e-07)" in step_line({"parity/ppo_kl_mb0": 0.0, "rollout_corr/logprob_abs_diff_max": 1.2e-7})
    assert "gap 1.0e-09  drift 2.0e-04" in step_line({"parity/ppo_kl_mb0": 1e-9, "actor/drift": 2e-4})
    times = {"timing_s/rollout": 2.934, "timing_s/sync": 0.0213, "timing_s/old_log_probs": 3.6e-5}
    assert step_line(times) == "rollout 2.93s sync 0.0213s", "what takes no time is not told"
    evaluated = {"evaluation/ocr": 0.5, "evaluation/reward": 0.25, "evaluation/reward_se": 0.1, "evaluation/reward_se_ema": 0.1}
    assert step_line(evaluated) == "evaluation/ocr 0.500  evaluation/reward 0.250"


def test_the_sheet_shows_every_image_pixel_for_pixel() -> None:
    rng = np.random.default_rng(0)
    images = [(f"caption {index}", rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)) for index in range(5)]
    sheet = np.asarray(image_grid(images))
    scale = 160 // 8
    height, width = sheet.shape[0] // 2, sheet.shape[1] // 3
    for index, (_, image) in enumerate(images):
        row, column = divmod(index, 3)
        cell = sheet[row * height + 4 :, column * width + 4 :][: 8 * scale, : 8 * scale]
        assert np.array_equal(cell[::scale, ::scale], image)
    with pytest.raises(ValueError, match="float64"):
        image_grid([("a", np.zeros((8, 8, 3)))])


def test_a_long_caption_takes_three_lines_and_no_more() -> None:
    sheet = np.asarray(image_grid([("word " * 60, np.full((160, 160, 3), 255, dtype=np.uint8))]))
    lines = sheet[4 + 160 :].min(axis=(1, 2))[: 3 * 14].reshape(3, 14)
    assert (lines.min(axis=1) < 128).all()
    assert sheet.shape[0] == 160 + 2 * 4 + 3 * 14


def test_a_run_folder_is_complete_after_every_step(
    tmp_path: Path, config: TrainConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    image = np.zeros((16, 16, 3), dtype=np.uint8)
    with Monitor(tmp_path / "run", config, total_steps=2) as monitor:
        for step in range(3):
            held_out = [("0.50 a 7", image)] * 70 if step != 1 else []
            metrics = {"critic/rewards/mean": 0.5, "actor/loss": math.nan}
            monitor.log(step, metrics, [("a 7", image)] * 9 if step else [], evaluation=held_out)
            rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
            assert [row["step"] for row in rows] == list(range(step + 1))
        monitor.summary(tmp_path / "run" / "checkpoints" / "step_2")
    assert rows[-1] == {"step": 2, "critic/rewards/mean": 0.5, "actor/loss": None, "alerts": 1.0, "alerts/names": "not_finite"}
    made = sorted(path.relative_to(tmp_path / "run").as_posix() for path in (tmp_path / "run").rglob("*") if path.is_file())
    sheets = ["evaluation_0000.png", "evaluation_0002.png", "step_0001.png", "step_0002.png"]
    assert made == ["config.yaml", "curve.png", *(f"images/{name}" for name in sheets), "metrics.jsonl", "summary.txt"]
    sizes = {name: Image.open(tmp_path / "run" / "images" / name).size for name in sheets}
    assert sizes["evaluation_0000.png"] == sizes["evaluation_0002.png"]
    cell = sizes["evaluation_0000.png"][0] // 8  # 64 of 70 are shown, 8 a row
    assert sizes["step_0002.png"][0] == 8 * cell, "a group of 8 a row"
    assert sizes["evaluation_0000.png"][1] == 4 * sizes["step_0002.png"][1], "8 rows against 2"
    assert "path: model" in (tmp_path / "run" / "config.yaml").read_text()
    printed = capsys.readouterr().out
    assert "step 1/2  reward 0.500  ALERT not_finite (2 steps so far)\n" in printed
    summary = (tmp_path / "run" / "summary.txt").read_text()
    assert printed.endswith(summary)
    for name in ("images/evaluation_0000.png", "images/evaluation_0002.png", "metrics.jsonl", "checkpoints/step_2"):
        assert str(tmp_path / "run" / name) in summary


def test_before_and_after_are_named_only_where_they_are_of_the_same_prompts_and_seeds(
    tmp_path: Path, config: TrainConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    image = np.zeros((16, 16, 3), dtype=np.uint8)
    with Monitor(tmp_path, config, total_steps=2) as monitor:
        monitor.log(0, {}, evaluation=[("a", image)])
        monitor.log(1, {}, [("b", image)])  # stopped before the second evaluation
        monitor.summary()
    assert "images" not in capsys.readouterr().out.replace(str(tmp_path), "")


def test_wandb_goes_offline_by_itself_and_stays_in_the_run_folder(
    tmp_path: Path, config: TrainConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    config.wandb.mode = None
    assert not has_key()
    with Monitor(tmp_path, config, total_steps=1) as monitor:
        monitor.log(1, {"critic/rewards/mean": 0.5}, [("a 7", np.zeros((16, 16, 3), dtype=np.uint8))] * 9)
        monitor.summary()
    runs = list((tmp_path / "wandb").glob("offline-run-*"))
    assert len(runs) == 1 and list(runs[0].glob("*.wandb"))
    assert f"wandb sync {runs[0]}" in capsys.readouterr().out
    assert len(list((runs[0] / "files" / "media" / "images").rglob("training_*.png"))) >= 1  # equal images are one file


def test_wandb_that_cannot_start_is_told_once_and_the_run_goes_on(
    tmp_path: Path, config: TrainConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    config.wandb.mode, config.wandb.project = "offline", "a/b"  # wandb refuses a slash
    with Monitor(tmp_path, config, total_steps=1) as monitor:
        monitor.log(1, {"critic/rewards/mean": 0.5})
        monitor.log(2, {"critic/rewards/mean": 0.5})
    assert capsys.readouterr().err.count("wandb did not start") == 1
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def test_no_room_for_a_line_ends_the_run_with_a_sentence(tmp_path: Path, config: TrainConfig) -> None:
    with Monitor(tmp_path, config, total_steps=2) as sight:
        (tmp_path / "metrics.jsonl").unlink()
        (tmp_path / "metrics.jsonl").symlink_to("/dev/full")  # takes nothing, as a disk without a free page
        with pytest.raises(RunFailedError, match=r"step 1 could not be written.*No space left.*resume=auto"):
            sight.log(1, {})


def test_a_key_is_found_where_wandb_finds_it(tmp_path: Path, config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password not-a-real-key\n")
    (tmp_path / "netrc").chmod(0o600)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert has_key()
    monkeypatch.setenv("WANDB_BASE_URL", "https://elsewhere.example")
    assert not has_key()
    monkeypatch.setenv("WANDB_API_KEY", "not-a-real-key")
    assert has_key()


def test_the_heat_map_shows_zero_gaps_nan_and_what_was_not_sampled_apart() -> None:
    sheet = np.asarray(heat_map([(1, {0: 0.0, 3: 1e-9}), (2, {0: 1e-2, 3: math.nan}), (3, {3: 1e-5})], clip_range=1e-2))
    cells = sheet[30 + 6 :: 12, 34 + 6 :: 12][:2, :3].tolist()
    assert cells[0] == [[214, 234, 214], [255, 0, 0], [255, 255, 255]]
    assert cells[1][0] == [255, 225, 0] and cells[1][1] == [0, 0, 0]
    assert 0 < cells[1][2][1] < 225, "between the palest and the clip range"
    with pytest.raises(ValueError, match="no step"):
        heat_map([(1, {})], 1e-2)


def test_the_heat_map_is_drawn_when_it_is_due(tmp_path: Path, config: TrainConfig) -> None:
    path = tmp_path / "images" / "parity_heatmap.png"
    with Monitor(tmp_path, config, total_steps=12) as monitor:
        drawn = []
        for step in range(1, 13):
            monitor.log(step, {"rollout_corr/logprob_abs_diff/ts_0": 1e-6 if step == 3 else 0.0})
            drawn += [step] if path.is_file() else []
            path.unlink(missing_ok=True)
    assert drawn == [3, 10, 12]


def test_an_alert_is_spelled_out_once_and_then_counted(
    tmp_path: Path, config: TrainConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    with Monitor(tmp_path, config, total_steps=3) as monitor:
        for step in range(1, 4):
            monitor.log(step, {"parity/weights_equal": 0.0 if step > 1 else 1.0}, notes={"weights/digest": f"d{step}"})
        monitor.summary()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["alerts"] for row in rows] == [0, 1, 1] and [row["weights/digest"] for row in rows] == ["d1", "d2", "d3"]
    printed = capsys.readouterr().out
    assert printed.count("Find it with: omni-rollout parity model.path=model") == 1
    assert "ALERT weights_differ (2 steps so far)" in printed and "weights_differ in 2 steps" in printed


def test_the_console_says_once_what_its_kl_compares(
    tmp_path: Path, config: TrainConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    with Monitor(tmp_path, config, total_steps=2) as monitor:
        for step in range(3):
            monitor.log(step, {"parity/ppo_kl_mb0": 0.0} if step else {})
    assert capsys.readouterr().out.count("gap: rollout engine against trainer, ") == 1


@pytest.mark.parametrize("field", ["latents", "log_probs"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_rollout_that_is_not_finite_stops_before_the_update(field: str, value: float) -> None:
    def trajectory(name: str) -> Any:
        return SimpleNamespace(request_id=name, latents=torch.zeros(3, 4, 2), log_probs=torch.zeros(2))

    rollout = [trajectory("a"), trajectory("b"), trajectory("c")]
    check_finite(1, rollout)
    getattr(rollout[1], field).view(-1)[-1] = value
    with pytest.raises(NotFiniteError, match=f"step 1: {field} of b are not finite, and of 0 more of 3") as caught:
        check_finite(1, rollout)
    assert caught.value.metrics == {"rollout/not_finite": 1.0}
