"""What one step has to show, the same under every back end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from omni_rollout.monitor.metrics import reward_metrics
from omni_rollout.monitor.pairs import NOT_APPLICABLE, PPO_KL_COMPARES, old_pair
from omni_rollout.monitor.update import update_metrics
from omni_rollout.policy.update import Update

NAMED = 5  # images that could not be scored, in a step's note


def step_metrics(
    update: Update,
    *,
    rewards: Sequence[float],
    breakdown: Mapping[str, Sequence[float]],
    failed: int,
    group_ids: Sequence[str],
    elements: int,
    padding: float,
    clip_range: float,
    timings: Mapping[str, float],
    kept: int,
    learning_rate: float,
    collisions: int,
    recomputed: bool,
    staleness: int,
    sampled: Mapping[str, float],
    drift: float,
) -> dict[str, float]:
    """Metrics of a step whose weights have been synced.

    Args:
        rewards, breakdown, group_ids: see `reward_metrics`; of the images that have a reward. No breakdown: a data set's
            images, which no reward scored.
        failed: images that have none.
        elements: numbers in a latent.
        padding: share of the text tokens; see `Collator.padding`.
        timings: stage -> seconds; `step` is the whole.
        kept: trajectories that had been finished before the run was stopped.
        collisions: repeated seeds so far.
        recomputed: whether the trainer computed the old log-probs anew.
        staleness: updates between the policy that sampled and the one that this step updated.
        sampled: see `Inspection.parity`.
        drift: of the weights after the step, see `policy.drift`.
    """
    return {
        "staleness": float(staleness),
        **update_metrics(update, elements=elements, clip_range=clip_range),
        **{name: value for name, value in sampled.items() if name.startswith("parity/")},
        **({**reward_metrics(rewards, group_ids, breakdown), "critic/rewards/failed": float(failed)} if breakdown else {}),
        **{f"timing_s/{stage}": seconds for stage, seconds in timings.items()},
        "perf/throughput": len(rewards) / timings["step"],  # images per second
        "rollout/kept": float(kept),
        "rollout/padding": padding,
        "actor/lr": learning_rate,
        "actor/drift": drift,
        "parity/weights_equal": 1.0,  # a difference has stopped the run in the sync
        "parity/seed_collisions": float(collisions),
        "actor/old_log_probs_recomputed": float(recomputed),
    }


def step_notes(
    update: Update,
    *,
    sampled_by: str,
    recomputed: bool,
    reused: Sequence[str],
    not_kept: str | None,
    not_scored: Sequence[str],
) -> dict[str, str]:
    """Texts of a step.

    Args:
        sampled_by: digest of the weights that sampled it.
        recomputed: see `step_metrics`.
        reused: which request repeated whose seed.
        not_kept: why a finished trajectory is not on disk.
        not_scored: a sentence for every image that a reward could not score.
    """
    notes = {"weights/digest": sampled_by, PPO_KL_COMPARES: old_pair(recomputed) if update.coupled else NOT_APPLICABLE}
    if reused:
        notes["seeds/reused"] = "; ".join(reused)
    if not_kept:
        notes["rollout/not_kept"] = not_kept
    if not_scored:
        notes["rewards/not_scored"] = "; ".join(not_scored[:NAMED])
    return notes
