"""`rollout.ahead=1` without a model: what it implies, what it refuses, and the figures of its correction."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from omni_rollout.config import OldLogProbs, TrainConfig
from omni_rollout.errors import UserError
from omni_rollout.launch.compose import compose
from omni_rollout.launch.validate import validate
from omni_rollout.monitor.metrics import timestep_gaps, weight_metrics
from omni_rollout.monitor.pairs import ENGINE_AGAINST_TRAINER, SAMPLER_AGAINST_TRAINER, pairs_of
from omni_rollout.policy.state import BEHAVIOUR, RunState
from omni_rollout.run.resume import behaviour_version
from omni_rollout.run.start import Start


@pytest.fixture
def composed(random_checkpoint, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red cat\n")
    common = [f"model.path={random_checkpoint}", f"prompts={tmp_path / 'prompts.txt'}", f"run_dir={tmp_path / 'run'}"]
    return lambda *more: compose([*common, *more])


def correction(config: TrainConfig) -> tuple[object, object, object]:
    algorithm = vars(config.algorithm)
    return config.trainer.old_log_probs, algorithm["rollout_is"], algorithm["rollout_is_threshold"]


def test_it_implies_a_bounded_correction_and_is_off_by_default(composed):
    assert composed().rollout.ahead == 0 and correction(composed()) == (None, None, "2.0")
    assert correction(composed("rollout.ahead=1")) == (OldLogProbs.recompute, "token", "2.0")
    given = composed("rollout.ahead=1", "algorithm.rollout_is=sequence", "algorithm.rollout_is_threshold=0.5_3.0")
    assert correction(given) == (OldLogProbs.recompute, "sequence", "0.5_3.0")
    for config in (composed("rollout.ahead=1"), given):
        validate(config)
    assert pairs_of(composed())["rollout_corr/*"] == ENGINE_AGAINST_TRAINER
    assert pairs_of(given)["rollout_corr/*"] == SAMPLER_AGAINST_TRAINER
    assert pairs_of(given)["parity/ppo_kl_mb0"] == ENGINE_AGAINST_TRAINER


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["rollout.ahead=2"], "rollout.ahead=2: expected 0, or 1"),
        (["rollout.ahead=-1"], "rollout.ahead=-1: expected 0, or 1"),
        (["rollout.ahead=1", "algorithm=diffusion_nft"], "rollout.ahead=1: diffusion_nft reads no log-probs"),
        (["rollout.ahead=1", "algorithm=awm"], "rollout.ahead=1: awm reads no log-probs"),
        (["rollout.ahead=1", "trainer.old_log_probs=rollout"], "trainer.old_log_probs=rollout with rollout.ahead=1"),
        (
            ["rollout.ahead=1", "backend=verl", "rollout.placement=colocated"],
            "rollout.ahead=1 with rollout.placement=colocated",
        ),
        (["rollout.ahead=1", "monitor.on_mismatch=recompute"], "every step recomputes already"),
        (["rollout.ahead=1", "algorithm.rollout_is_threshold=0"], "algorithm.rollout_is_threshold=0: expected"),
    ],
)
def test_what_it_cannot_be_had_with_is_refused_by_name(composed, overrides, message):
    with pytest.raises(UserError) as refused:
        validate(composed(*overrides))
    assert message in str(refused.value) and len(str(refused.value).splitlines()) == 1


def test_an_algorithm_that_samples_with_its_old_policy_is_refused(composed, tmp_path):
    (tmp_path / "mine.py").write_text(
        "from omni_rollout.algorithms.base import Coupled\n"
        "class Mine(Coupled):\n    keeps_old = samples_with_old = True\n    def old_decay(self, updates): return 0.5\n"
    )
    with pytest.raises(UserError, match=r"rollout\.ahead=1: mine samples with an old policy of its own; give rollout\.ahead=0"):
        validate(composed("rollout.ahead=1", f"algorithm.source={tmp_path / 'mine.py'}"))


@settings(deadline=None)
@given(st.lists(st.floats(0, 4, width=32), min_size=1, max_size=40))
def test_the_figures_of_the_weights_are_those_of_independent_arithmetic(weights: list[float]) -> None:
    found = weight_metrics(torch.tensor(weights, dtype=torch.float32))
    count, square = len(weights), math.fsum(weight * weight for weight in weights)
    share = math.fsum(weights) ** 2 / (count * square) if square else 0.0  # Kish's, over the number of samples
    assert found["rollout_corr/rollout_is_mean"] == pytest.approx(math.fsum(weights) / count)
    assert (found["rollout_corr/rollout_is_min"], found["rollout_corr/rollout_is_max"]) == (min(weights), max(weights))
    assert found["rollout_corr/rollout_is_eff_sample_size"] == pytest.approx(share)


def test_gaps_between_two_policies_are_no_gaps_between_engine_and_trainer() -> None:
    gaps = {"rollout_corr/logprob_abs_diff/ts_3": 0.5}
    assert timestep_gaps({**gaps, "staleness": 0.0}) == {3: 0.5}
    assert timestep_gaps({**gaps, "staleness": 1.0}) == {}


def test_a_run_goes_on_with_the_policy_before_the_latest_update_where_it_was_kept(tmp_path: Path) -> None:
    start = Start(checkpoint=tmp_path, run=RunState(step=7, weights="d"))
    assert behaviour_version(Start()) == 0 and behaviour_version(start) == 7
    (tmp_path / BEHAVIOUR).mkdir()
    assert behaviour_version(start) == 6
