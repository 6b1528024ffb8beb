"""What is wrong with how a run is spread over processes."""

from __future__ import annotations

import re
from collections.abc import Iterator

from omni_rollout.config import AUTO, Backend, Offload, Placement, RolloutOffload, TrainConfig, TrainerEngineName


def process_problems(config: TrainConfig) -> Iterator[str]:
    """One line for each problem: what was given, what is expected, what to do."""
    yield from _counts(config)
    yield from _turns(config)
    if config.profile and config.backend is Backend.verl:
        yield "profile=true: backend=verl takes a step in several processes, and a profile is of one; give backend=embedded"
    if (url := config.rollout.url) is not None and not re.fullmatch(r"https?://[^/\s,]+/?(,https?://[^/\s,]+/?)*", url):
        yield f"rollout.url={url}: expected http://HOST:PORT, as omni-rollout serve prints it; of several, a comma between them"
    if url is not None and config.backend is Backend.verl:
        yield f"rollout.url={url}: backend=verl has engines of its own; give backend=embedded"


def _counts(config: TrainConfig) -> Iterator[str]:
    workers, ranks = config.rollout.workers, config.trainer.ranks
    if config.backend is Backend.embedded:
        for key, number in (("rollout.workers", workers or 1), ("trainer.ranks", ranks)):
            if number > 1:
                yield f"{key}={number}: backend=embedded is one process; give backend=verl"
    if config.rollout.placement is Placement.apart:
        return
    if config.backend is Backend.embedded:
        yield "rollout.placement=colocated: backend=embedded is one process, so it is colocated already; leave it out"
    elif workers not in (None, ranks):
        yield (
            f"rollout.workers={workers} with rollout.placement=colocated: each of trainer.ranks={ranks} processes holds "
            "one engine; leave rollout.workers out"
        )


def _turns(config: TrainConfig) -> Iterator[str]:
    """What leaves the device while the other side computes, where one process holds both."""
    both = config.backend is Backend.embedded or config.rollout.placement is Placement.colocated
    if config.rollout.offload is not RolloutOffload.none and (not both or config.rollout.url is not None):
        yield (
            f"rollout.offload={config.rollout.offload.value}: of an engine in the trainer's process; "
            "leave it out, or give backend=embedded without rollout.url, or rollout.placement=colocated"
        )
    offload = config.trainer.offload
    if offload is not Offload.none and config.trainer.engine is TrainerEngineName.torch and not both:
        yield (
            f"trainer.offload={offload.value} with trainer.engine=torch: offloads while a rollout is sampled in the same "
            "process; give backend=embedded, rollout.placement=colocated, or trainer.engine=deepspeed (or fsdp2, with all)"
        )


def max_num_seqs_problems(config: TrainConfig) -> Iterator[str]:
    rollout = config.rollout
    if rollout.max_num_seqs == AUTO and (rollout.url is not None or config.backend is Backend.verl):
        yield (
            "rollout.max_num_seqs=auto: only an engine in this process can be measured; "
            "give a number, or backend=embedded without rollout.url"
        )
