"""`rollout.ahead=1`: what follows from it for other keys, and what it cannot be had with."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from omni_rollout.algorithms import get_algorithm
from omni_rollout.algorithms.base import Coupled
from omni_rollout.config import OldLogProbs, Placement, TrainConfig
from omni_rollout.errors import UserError


def implied(config: TrainConfig) -> TrainConfig:
    """Where nothing else was given: old log-probs are the trainer's own, and each step's loss is weighed (token, up to 2)."""
    algorithm, trainer = config.algorithm, config.trainer
    known = trainer.old_log_probs is not OldLogProbs.rollout  # else `problems` says so
    if not config.rollout.ahead or not isinstance(algorithm, Coupled) or not known:
        return config
    return replace(
        config,
        trainer=replace(trainer, old_log_probs=OldLogProbs.recompute),
        algorithm=replace(algorithm, rollout_is=algorithm.rollout_is or "token"),
    )


def problems(config: TrainConfig) -> Iterator[str]:
    """What is wrong with `rollout.ahead` in this configuration, a line each."""
    ahead = config.rollout.ahead
    if ahead not in (0, 1):
        yield f"rollout.ahead={ahead}: expected 0, or 1 to sample the next batch while this one is learned from"
    if ahead != 1:
        return
    try:
        algorithm = get_algorithm(config.algorithm)
    except UserError:  # told where algorithms are checked
        return
    if not isinstance(algorithm, Coupled):
        yield (
            f"rollout.ahead=1: {algorithm.name} reads no log-probs, so nothing could correct for an older policy; "
            "give rollout.ahead=0"
        )
    elif algorithm.samples_with_old:
        yield f"rollout.ahead=1: {algorithm.name} samples with an old policy of its own; give rollout.ahead=0"
    if config.rollout.placement is Placement.colocated:
        yield (
            "rollout.ahead=1 with rollout.placement=colocated: an engine and a rank in one process take turns, so nothing is "
            "sampled meanwhile; give rollout.placement=apart, or rollout.ahead=0"
        )
    if config.trainer.old_log_probs is OldLogProbs.rollout:
        yield (
            "trainer.old_log_probs=rollout with rollout.ahead=1: those are of an older policy than the one to learn from; "
            "leave it out, or give trainer.old_log_probs=recompute"
        )
