from __future__ import annotations

import math
import shlex
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from omni_rollout.commands.parity import READS
from omni_rollout.config import DType, Parity, TrainConfig
from omni_rollout.errors import UserError
from omni_rollout.launch.compose import compose
from omni_rollout.launch.validate import validate
from omni_rollout.monitor import find_alerts, parity_metrics, ratio_metrics
from omni_rollout.monitor.alerts import leaning
from omni_rollout.monitor.suggested import parity_command, train_command


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    return compose([f"model.path={tmp_path}", "prompts=p.txt", "run_dir=runs/a b", "trainer.clip_range=1e-2"])


def names(metrics: dict[str, float], config: TrainConfig, **notes: str) -> list[str]:
    texts = {key.replace("__", "/"): text for key, text in notes.items()}
    return [alert.name for alert in find_alerts(7, metrics, config, texts)]


def parity_of(gap: float, config: TrainConfig) -> dict[str, float]:
    rollout = torch.full((2, 2), 1.0)
    trainer = rollout - torch.tensor([[0.0, 0.0], [0.0, gap]])
    return parity_metrics(rollout, trainer, torch.tensor([[0, 1], [0, 1]]), 64, config.trainer.clip_range)


def test_a_healthy_step_alerts_nobody(config: TrainConfig) -> None:
    healthy = {
        **parity_of(0.0, config),
        **ratio_metrics(torch.ones(4), torch.ones(4), 1e-2),
        "parity/weights_equal": 1.0,
        "parity/seed_collisions": 0.0,
        "actor/skipped_updates": 0.0,
    }
    assert names(healthy, config) == []
    assert names({}, config) == []  # the state before training has no KL


@pytest.mark.parametrize("parity", [Parity.exact, Parity.reference])
def test_the_last_bit_of_one_log_prob_is_an_alert_where_equality_is_promised(config: TrainConfig, parity: Parity) -> None:
    config.parity = parity
    (alert,) = find_alerts(7, parity_of(2**-23, config), config)
    assert alert.name == "kl_nonzero"
    assert alert.sentence.startswith("step 7: rollout engine against trainer, 25.0% of the log-probs")
    assert "KL 3.0e-08 per element (1.9e-06 nats per denoising step)" in alert.sentence
    assert alert.sentence.endswith("the largest gap is 1.2e-05 clip ranges, most at step index 1")
    assert "the weights were proven equal" in alert.cause


def test_gaps_that_cancel_in_the_kl_are_an_alert(config: TrainConfig) -> None:
    metrics = parity_metrics(torch.tensor([[1.0, 2.0]]), torch.tensor([[2.0, 1.0]]), torch.tensor([[0, 1]]), 8, 1.0)
    assert metrics["parity/ppo_kl_mb0"] == 0.0
    assert names(metrics, config) == ["kl_nonzero"]


@pytest.mark.parametrize(("gap", "expected"), [(4e-3, []), (-0.039, []), (0.041, ["kl_nonzero"]), (-0.041, ["kl_nonzero"])])
def test_the_fast_profile_alerts_beyond_the_clip_range_only(config: TrainConfig, gap: float, expected: list[str]) -> None:
    config.parity = Parity.fast
    assert names(parity_of(gap, config), config) == expected  # the KL is a quarter of the gap, clip_range 0.01


def test_weights_seeds_and_rewards_are_quoted(config: TrainConfig) -> None:
    assert names({"parity/weights_equal": 0.0}, config) == ["weights_differ"]
    (weights,) = find_alerts(7, {"parity/weights_equal": 0.0}, config, {"weights/difference": "weight a.b: different there"})
    assert weights.sentence == "step 7: weight a.b: different there"
    assert names({"parity/seed_collisions": 1.0}, config) == ["seed_reused"]
    (seed,) = find_alerts(7, {"parity/seed_collisions": 2.0}, config, {"seeds/reused": "seed 5 of b was used by a"})
    assert "seed 5 of b was used by a" in seed.sentence
    assert shlex.split(seed.command) == ["grep", "seeds/reused", "runs/a b/metrics.jsonl"]
    assert names({}, config, rewards__failure="ocr: image 3: the reward is nan") == ["reward_failed"]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_any_metric_that_is_not_finite_is_an_alert(config: TrainConfig, value: float) -> None:
    (alert,) = find_alerts(7, {"a/b": value, "c": 1.0}, config)
    assert alert.name == "not_finite" and alert.sentence == "step 7: not finite: a/b"


def test_skipped_updates_are_an_alert_and_name_the_next_try(config: TrainConfig) -> None:
    config.model.dtype = DType.bfloat16
    (alert,) = find_alerts(7, {"actor/skipped_updates": 1.0}, config)
    assert alert.name == "not_finite" and "they changed no weight" in alert.sentence
    words = shlex.split(alert.command)
    assert words[:2] == ["omni-rollout", "train"]
    again = compose(words[2:])
    assert again.trainer.learning_rate == config.trainer.learning_rate / 10
    assert again.model.dtype is DType.float32, "the run's own dtype is replaced, not repeated"


def test_a_nan_log_prob_is_both_a_mismatch_and_not_finite(config: TrainConfig) -> None:
    assert names(parity_of(math.nan, config), config) == ["not_finite", "kl_nonzero"]


def ratio(mean: float = 1.0, std: float = 0.0, higher: float = 0.0, lower: float = 0.0) -> dict[str, float]:
    return {
        "actor/ratio_mean": mean,
        "actor/ratio_std": std,
        "actor/pg_clipfrac_higher": higher,
        "actor/pg_clipfrac_lower": lower,
    }


@pytest.mark.parametrize(
    ("metrics", "leans"),
    [
        (ratio(), False),
        (ratio(1.0031, 0.01), True),  # 100 trajectories: a standard error of 0.001
        (ratio(0.9969, 0.01), True),
        (ratio(1.0029, 0.01), False),
        (ratio(1.0009, 0.0), False),  # below a tenth of the clip range, 0.01
        (ratio(1.0011, 0.0), True),
        (ratio(higher=0.10), True),  # 10 of 100: a fair coin's three deviations are 9.5
        (ratio(higher=0.08), False),
        (ratio(higher=0.3, lower=0.3), False),
        (ratio(higher=0.2, lower=0.4), False),  # 20 of 60, below 23.2
        (ratio(higher=0.15, lower=0.45), True),
        (ratio(math.nan), False),  # not_finite says it
    ],
)
def test_a_ratio_leans(metrics: dict[str, float], leans: bool) -> None:
    assert (leaning(metrics, 100, 0.01) is not None) is leans


@settings(deadline=None, max_examples=100)
@given(st.integers(0, 2**32 - 1), st.integers(8, 64))
def test_an_unbiased_ratio_seldom_leans_and_a_shifted_one_always_does(seed: int, trajectories: int) -> None:
    noise = torch.randn(trajectories, generator=torch.Generator().manual_seed(seed)) * 0.01
    centred = (noise - noise.mean()).double().float()
    even = torch.cat([centred, -centred])
    assert leaning(ratio_metrics(even, torch.zeros_like(even), 0.01), trajectories, 0.01) is None
    shifted = even - 0.1
    assert leaning(ratio_metrics(shifted, torch.zeros_like(even), 0.01), trajectories, 0.01) is not None


def test_why_a_ratio_leans_depends_on_the_kl_and_groups_without_a_loss_do_not_count(config: TrainConfig) -> None:
    leaning_ratio = ratio(0.9, 0.01)
    (alone,) = find_alerts(7, leaning_ratio, config)
    assert alone.command.endswith("trainer.updates_per_step=1")
    with_kl = find_alerts(7, {**leaning_ratio, **parity_of(0.1, config)}, config)
    assert [alert.name for alert in with_kl] == ["kl_nonzero", "ratio_leans"]
    assert with_kl[1].command == with_kl[0].command == parity_command(config)
    few = {**ratio(0.99, 0.01), "critic/rewards/zero_std_ratio": 0.75}  # 8 of 32 trajectories: a standard error of 0.0035
    assert names(few, config) == []
    assert names({**few, "critic/rewards/zero_std_ratio": 0.0}, config) == ["ratio_leans"]


@pytest.mark.parametrize("text", [" ", "blurry, low quality", 'a "b" \\0 \\"c', "it's\\", "null", "1e5", "{a: [1]}=$x"])
def test_a_command_composes_to_what_the_run_was_given(text: str) -> None:
    config = compose(["model=nano", "prompts=p.txt", "sampling.sde_window_range=[0,4]", "reward=jpeg_compressibility"])
    config.sampling.negative_prompt, config.trainer.lora_rank, config.threads = text, 4, 2
    again = compose(shlex.split(train_command(config))[2:])
    again.run_dir = config.run_dir
    assert again == config
    parity = compose(shlex.split(parity_command(config))[2:], name="parity", unused=["prompts"], reads=READS)
    assert (parity.model, parity.sampling, parity.trainer.lora_rank) == (config.model, config.sampling, 4)
    assert parity.reward != config.reward


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["monitor.on_mismatch=stop", "parity=fast"], "monitor.on_mismatch=stop with parity=fast: .* no equal log-probs"),
        (["monitor.on_mismatch=recompute", "trainer.old_log_probs=recompute"], "every step recomputes already"),
    ],
)
def test_a_guard_that_cannot_guard_is_refused(tmp_path: Path, overrides: list[str], message: str) -> None:
    (tmp_path / "prompts.txt").write_text("a red square\n")
    sound = ["model=nano", f"prompts={tmp_path}/prompts.txt"]
    validate(compose([*sound, overrides[0]]))
    with pytest.raises(UserError, match=message):
        validate(compose([*sound, *overrides]))
