"""1 where an image shows all that a prompt asks for, as GenEval (arXiv 2310.11513) counts it, else 0; see `geneval`."""

from __future__ import annotations

from omni_rollout.rewards.geneval import MODEL, GenEval


def make(threads: int, model: str = MODEL) -> GenEval:
    return GenEval("geneval_strict", model, strict=True)
