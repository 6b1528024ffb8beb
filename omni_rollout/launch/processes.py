"""What is wrong with how a run is spread over processes."""

from __future__ import annotations

import re
from collections.abc import Iterator

from omni_rollout.config import AUTO, Backend, Placement, TrainConfig


def process_problems(config: TrainConfig) -> Iterator[str]:
    """One line for each problem: what was given, what is expected, what to do."""
    yield from _counts(config)
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


def max_num_seqs_problems(config: TrainConfig) -> Iterator[str]:
    rollout = config.rollout
    if rollout.max_num_seqs == AUTO and (rollout.url is not None or config.backend is Backend.verl):
        yield (
            "rollout.max_num_seqs=auto: only an engine in this process can be measured; "
            "give a number, or backend=embedded without rollout.url"
        )
