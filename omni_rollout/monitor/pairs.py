"""Which two programs a KL compares: the name of a metric does not say it, and readers guess wrong."""

from __future__ import annotations

from omni_rollout.algorithms import get_algorithm
from omni_rollout.algorithms.base import Coupled
from omni_rollout.config import OldLogProbs, TrainConfig

ENGINE_AGAINST_TRAINER = "rollout engine against trainer"
TRAINER_AGAINST_ITSELF = "trainer against itself"
TRAINER_AGAINST_START = "trainer against the policy the run started from"
SAMPLER_AGAINST_TRAINER = "the policy that sampled against the trainer's, `staleness` updates later"
NOT_APPLICABLE = "not applicable: learns from final latents, not from log-probs"
PPO_KL_COMPARES = "actor/ppo_kl/compares"  # the note of each step that says it for its own `actor/*`


def old_pair(recomputed: bool) -> str:
    """What the ratio and its KL compare, when the trainer computed the old log-probs anew, or took the rollout's."""
    return TRAINER_AGAINST_ITSELF if recomputed else ENGINE_AGAINST_TRAINER


def pairs_of(config: TrainConfig) -> dict[str, str]:
    """Metric, or `prefix*`, -> the pair it compares in this run; where the guard recomputes, that step's note says so."""
    old = old_pair(config.trainer.old_log_probs is OldLogProbs.recompute)
    if not isinstance(get_algorithm(config.algorithm), Coupled):
        return {"parity/weights_equal": ENGINE_AGAINST_TRAINER}
    return {
        "parity/ppo_kl_mb0": ENGINE_AGAINST_TRAINER,
        "parity/kl_nats": ENGINE_AGAINST_TRAINER,
        "parity/over_clip": ENGINE_AGAINST_TRAINER,
        "parity/bitwise_equal_fraction": ENGINE_AGAINST_TRAINER,
        "parity/weights_equal": ENGINE_AGAINST_TRAINER,
        "rollout_corr/*": SAMPLER_AGAINST_TRAINER if config.rollout.ahead else ENGINE_AGAINST_TRAINER,
        "actor/ppo_kl": old,
        "actor/ratio_*": old,
        "actor/pg_clipfrac*": old,
        "actor/ref_kl": TRAINER_AGAINST_START,
    }
