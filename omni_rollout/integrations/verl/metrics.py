"""What one step has to show, put together from the ranks' shares: the embedded trainer's numbers under its names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from omni_rollout.monitor import CaptionedImage
from omni_rollout.policy.update import Scores, Update
from omni_rollout.run import evaluation

TIMINGS = {"gen": "rollout", "update_actor": "update", "update_weights": "weight_sync", "step": "step"}  # verl's -> ours


@dataclass(frozen=True, kw_only=True)
class Source:
    """What the seed ledger asks of a trajectory; the trajectory itself goes to the ranks alone."""

    request_id: str
    fingerprint: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Samples:
    """A step's images and what their rewards are made of, in the order of request ids."""

    prompts: list[dict[str, Any]]  # text, metadata
    media: list[np.ndarray]
    breakdown: dict[str, list[float | None]]  # reward name -> one an image, before its weight
    failures: list[str]  # a sentence for every image and reward that failed
    group_ids: list[str]
    sources: list[Source]
    elements: int  # numbers in a latent

    @classmethod
    def of(cls, stored: Sequence[Mapping[str, Any]], tags: Sequence[Mapping[str, Any]]) -> Samples:
        return cls(
            prompts=[sample["prompt"] for sample in stored],
            media=[sample["media"] for sample in stored],
            breakdown={name: [sample["breakdown"][name] for sample in stored] for name in stored[0]["breakdown"]},
            failures=[failure for sample in stored for failure in sample["failures"]],
            group_ids=[tag["group_id"] for tag in tags],
            sources=[
                Source(request_id=tag["request_id"], fingerprint=sample["fingerprint"])
                for tag, sample in zip(tags, stored, strict=True)
            ],
            elements=stored[0]["elements"],
        )


def captioned(samples: Samples, rewards: Sequence[float | None]) -> list[CaptionedImage]:
    return evaluation.captioned(rewards, [prompt["text"] for prompt in samples.prompts], samples.media)


def merged(updates: Sequence[Update]) -> Update:
    """The ranks' shares of one update as one: rank after rank."""

    def together(scores: Sequence[Scores]) -> Scores:
        return Scores(
            step_indices=[index for one in scores for index in one.step_indices],
            rollout_log_probs=[row for one in scores for row in one.rollout_log_probs],
            old_log_probs=[row for one in scores for row in one.old_log_probs],
            log_probs=[row for one in scores for row in one.log_probs],
        )

    return Update(
        coupled=updates[0].coupled,
        first=together([update.first for update in updates]),
        all=together([update.all for update in updates]),
        losses=[loss for update in updates for loss in update.losses],
        ref_kls=[kl for update in updates for kl in update.ref_kls],
        metrics={
            name: [value for update in updates for value in update.metrics.get(name, ())]
            for name in dict.fromkeys(name for update in updates for name in update.metrics)
        },
        grad_norms=updates[0].grad_norms,  # of the sum over the ranks, the same on each
        weights=updates[0].weights,  # of all rows, as each rank has them
        moved=updates[0].moved,
    )


def our_timings(timings: Mapping[str, float]) -> dict[str, float]:
    """verl's seconds by our names of the stages."""
    return {ours: timings[theirs] for theirs, ours in TIMINGS.items() if theirs in timings}
