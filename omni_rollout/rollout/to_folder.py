"""`omni-rollout rollout`: prompts in, one capsule per sample out, with its image, video or layers beside it.

index.jsonl      a line for each file: prompt, seed, group, member, and the capsule's name
grid.png         the first images on one sheet, a group a row
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from transformers import AutoTokenizer

from omni_rollout.config import TrainConfig
from omni_rollout.data.collate import Collator
from omni_rollout.launch.progress import Progress
from omni_rollout.rollout.choice import make_engine
from omni_rollout.rollout.engine import RolloutEngine
from omni_rollout.trajectories.capsule import CapsuleError, save_capsule
from omni_rollout.trajectories.media import save_media
from omni_rollout.trajectories.sheet import CaptionedImage, image_grid
from omni_rollout.types import Prompt, RequestError, RolloutRequest, Trajectory

ON_SHEET = 64  # images at most
Prepare = Callable[[RolloutEngine], None]  # gives a fresh engine other weights


def rollout_to_folder(
    config: TrainConfig, prompts: Sequence[Prompt], out: Path, progress: Progress, prepare: Prepare | None = None
) -> tuple[int, int]:
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
    with engine_of(config, progress, prepare) as engine:
        made = sample_to_folder(engine, requests, out, progress)
    if made:
        shown = [made[name] for name in sorted(made)[:ON_SHEET]]
        image_grid(shown, config.rollout.group_size if config.rollout.group_size > 1 else None).save(out / "grid.png")
    return len(made), refused + len(requests) - len(made)


def engine_of(config: TrainConfig, progress: Progress, prepare: Prepare | None = None) -> RolloutEngine:
    """The engine that `config` asks for, closed again where `prepare` fails."""
    progress.stage("loading the model into the engine")
    engine = make_engine(config, progress)
    if prepare is not None:
        try:
            progress.stage("loading the checkpoint into the engine")
            prepare(engine)
        except BaseException:
            engine.close()
            raise
    return engine


def sample_to_folder(
    engine: RolloutEngine, requests: Sequence[RolloutRequest], out: Path, progress: Progress
) -> dict[str, CaptionedImage]:
    """A capsule, its media and a line of `index.jsonl` in `out` for each request; `progress` is told of those that fail.

    Returns:
        What was made, by request id, captioned by its prompt.
    """

    def report(request: RolloutRequest, error: Exception) -> None:
        progress.say(f"failed: {request.request_id}: {error}")

    out.mkdir(parents=True, exist_ok=True)
    made: dict[str, CaptionedImage] = {}
    steps, pipeline = sum(request.spec.num_inference_steps for request in requests), engine.pipeline
    before = pipeline.steps
    progress.stage(f"sampling, 0/{len(requests)} images", steps, "steps", count=lambda: min(pipeline.steps - before, steps))
    with (out / "index.jsonl").open("w", encoding="utf-8") as index:
        for trajectory in engine.generate(requests, on_error=report):
            try:
                save_capsule(trajectory, out / f"{trajectory.request_id}.safetensors")
                for path in save_media(trajectory, out / trajectory.request_id):
                    index.write(json.dumps({"file": path.name, **_entry(trajectory)}, ensure_ascii=False) + "\n")
                made[trajectory.request_id] = (trajectory.prompt.text, trajectory.media)
                progress.describe(f"sampling, {len(made)}/{len(requests)} images")
            except CapsuleError as error:  # numbers that overflowed, in this image alone
                progress.say(f"failed: {error}")
    return made


def _entry(trajectory: Trajectory) -> dict[str, object]:
    return {
        "prompt": trajectory.prompt.text,
        "seed": trajectory.seed,
        "group": trajectory.group_id,
        "member": trajectory.member,
        "capsule": f"{trajectory.request_id}.safetensors",
        "sde_type": trajectory.spec.sde_type,
        "weights": trajectory.fingerprint["weights"],
        "policy_version": trajectory.policy_version,
    }
