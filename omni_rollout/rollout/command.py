"""`omni-rollout rollout`: prompts in, one capsule per sample out, with its image, video or layers beside it."""

from __future__ import annotations

import sys
from pathlib import Path

from transformers import AutoTokenizer

from omni_rollout.config import TrainConfig
from omni_rollout.data.collate import Collator
from omni_rollout.data.prompts import load_prompts
from omni_rollout.rollout.engine import RolloutEngine
from omni_rollout.trajectories.capsule import CapsuleError, save_capsule
from omni_rollout.trajectories.media import save_media
from omni_rollout.types import RequestError, RolloutRequest


def rollout_to_folder(config: TrainConfig, prompts: Path, out: Path) -> int:
    """Samples `rollout.group_size` images of every prompt into `out`, named by group and member.

    Returns:
        How many images could not be made; each is named on stderr, and the others are there.
    """
    tokenizer = AutoTokenizer.from_pretrained(config.model.path, subfolder="tokenizer")
    collator = Collator(config.model.family, tokenizer, config.sampling, config.collate)
    requests: list[RolloutRequest] = []
    failed = 0
    for position, prompt in enumerate(load_prompts(prompts)):
        try:
            requests += collator.groups([prompt], position, config.rollout.group_size)
        except RequestError as error:
            failed += config.rollout.group_size
            print(f"refused: {error}", file=sys.stderr)
    if not requests:
        return failed

    def report(request: RolloutRequest, error: Exception) -> None:
        nonlocal failed
        failed += 1
        print(f"failed: {request.request_id}: {error}", file=sys.stderr)

    out.mkdir(parents=True, exist_ok=True)
    model = config.model
    with RolloutEngine(
        model.path,
        family=model.family,
        dtype=model.dtype.value,
        max_num_seqs=config.rollout.max_num_seqs,
        parity=config.parity.value,
    ) as engine:
        for trajectory in engine.generate(requests, on_error=report):
            try:
                save_capsule(trajectory, out / f"{trajectory.request_id}.safetensors")
                save_media(trajectory, out / trajectory.request_id)
            except CapsuleError as error:  # numbers that overflowed, in this image alone
                failed += 1
                print(f"failed: {error}", file=sys.stderr)
    return failed
