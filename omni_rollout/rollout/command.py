"""`omni-rollout rollout`: prompts in, one capsule per sample out, with its image, video or layers beside it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoTokenizer

from omni_rollout.config import TrainConfig
from omni_rollout.data.collate import Collator
from omni_rollout.launch.progress import Progress
from omni_rollout.rollout.engine import RolloutEngine
from omni_rollout.trajectories.capsule import CapsuleError, save_capsule
from omni_rollout.trajectories.media import save_media
from omni_rollout.types import Prompt, RequestError, RolloutRequest


def rollout_to_folder(config: TrainConfig, prompts: Sequence[Prompt], out: Path, progress: Progress) -> tuple[int, int]:
    """Samples `rollout.group_size` images of every prompt into `out`, named by group and member.

    Returns:
        How many images were made, and how many could not be; `progress` is told of each of those.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    progress.stage("loading the tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(config.model.path, subfolder="tokenizer")
    collator = Collator(config.model.family, tokenizer, config.sampling, config.collate)
    requests: list[RolloutRequest] = []
    refused = 0
    for position, prompt in enumerate(prompts):
        try:
            requests += collator.groups([prompt], position, config.rollout.group_size)
        except RequestError as error:
            refused += config.rollout.group_size
            progress.say(f"refused: {error}")
    if not requests:
        return 0, refused
    out.mkdir(parents=True, exist_ok=True)
    made = _sample(config, requests, out, progress)
    return made, refused + len(requests) - made


def _sample(config: TrainConfig, requests: Sequence[RolloutRequest], out: Path, progress: Progress) -> int:
    def report(request: RolloutRequest, error: Exception) -> None:
        progress.say(f"failed: {request.request_id}: {error}")

    made = 0
    model = config.model
    progress.stage("loading the model into the engine")
    with RolloutEngine(
        model.path,
        family=model.family,
        dtype=model.dtype.value,
        max_num_seqs=config.rollout.max_num_seqs,
        parity=config.parity.value,
    ) as engine:
        steps, pipeline = sum(request.spec.num_inference_steps for request in requests), engine.pipeline
        before = pipeline.steps
        progress.stage(f"sampling, 0/{len(requests)} images", steps, "steps", count=lambda: min(pipeline.steps - before, steps))
        for trajectory in engine.generate(requests, on_error=report):
            try:
                save_capsule(trajectory, out / f"{trajectory.request_id}.safetensors")
                save_media(trajectory, out / trajectory.request_id)
                made += 1
                progress.describe(f"sampling, {made}/{len(requests)} images")
            except CapsuleError as error:  # numbers that overflowed, in this image alone
                progress.say(f"failed: {error}")
    return made
