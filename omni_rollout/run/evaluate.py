"""`omni-rollout evaluate`: a model or a checkpoint on held-out prompts, as training evaluates, into a folder.

metrics.json     the metrics, and what was evaluated: checkpoint, digest of its weights, sampling, seed
index.jsonl      a line for each file: prompt, seed, and what each reward says
*.png, grid.png  the images
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from omni_rollout.config import TrainConfig
from omni_rollout.data.collate import Collator
from omni_rollout.data.prompts import load_prompts
from omni_rollout.launch.progress import Progress
from omni_rollout.models import family_module
from omni_rollout.rewards import RewardBatch, make_rewards
from omni_rollout.rollout.choice import Engine
from omni_rollout.rollout.to_folder import ON_SHEET, engine_of
from omni_rollout.run.evaluation import captioned, evaluated
from omni_rollout.run.restore import put_into
from omni_rollout.run.source import Source
from omni_rollout.trajectories.media import save_media
from omni_rollout.trajectories.sheet import image_grid
from omni_rollout.types import RolloutRequest, Trajectory


def evaluate(config: TrainConfig, out: Path, progress: Progress, source: Source | None = None) -> dict[str, float]:
    """Samples, scores and keeps `evaluation.images` images (0: one of every prompt) of `config.prompts`; returns metrics.

    Raises:
        UserError: prompts that a reward cannot score or the model cannot be given, or a checkpoint that does not fit.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    prompts = load_prompts(config.prompts, "test")
    rewards = make_rewards(config)
    rewards.check(prompts, family_module(config.model.family, "spec").KIND)
    tokenizer = AutoTokenizer.from_pretrained(config.model.path, subfolder="tokenizer")
    collator = Collator(config.model.family, tokenizer, config.sampling, config.collate)
    for prompt in prompts:
        collator.check(collator.spec(images=prompt.images), prompt)
    settings = replace(config.evaluation, images=config.evaluation.images or len(prompts))
    requests = collator.evaluation(prompts, settings, "held-out")
    prepare = None if source is None else lambda engine: put_into(engine, config, source)
    with engine_of(config, progress, prepare) as engine:
        trajectories = sampled(engine, requests, progress, config.rollout.timeout)
    progress.stage(f"scoring {len(requests)} images by {', '.join(config.reward.weights)}")
    media, asked = [one.media for one in trajectories], [one.prompt for one in trajectories]
    scored = rewards(media, asked)
    metrics, notes = evaluated(rewards, media, asked, scored)
    for note in notes.values():
        progress.say(f"not scored: {note}")
    about = {"checkpoint": None if source is None else source.name, "model": config.model.path}
    _write(out, trajectories, scored, metrics, about)
    return metrics


def sampled(
    engine: Engine, requests: Sequence[RolloutRequest], progress: Progress, timeout: float, what: str = "evaluating"
) -> list[Trajectory]:
    """All of the requests' images, in the order of their ids; how far they are is shown."""
    progress.stage(f"{what} {len(requests)} images", len(requests), "images")
    made = progress.track(engine.generate(requests, timeout=timeout))  # not by steps: the engine may be elsewhere
    return sorted(made, key=lambda trajectory: trajectory.request_id)


def _write(
    out: Path, trajectories: Sequence[Trajectory], scored: RewardBatch, metrics: dict[str, float], about: dict[str, Any]
) -> None:
    out.mkdir(parents=True, exist_ok=True)
    with (out / "index.jsonl").open("w", encoding="utf-8") as index:
        for place, trajectory in enumerate(trajectories):
            values = {name: values[place] for name, values in scored.breakdown.items()}
            for path in save_media(trajectory, out / f"{place:05d}"):
                entry = {"file": path.name, "prompt": trajectory.prompt.text, "seed": trajectory.seed}
                index.write(json.dumps({**entry, "reward": scored.total[place], **values}, ensure_ascii=False) + "\n")
    texts, media = [one.prompt.text for one in trajectories], [one.media for one in trajectories]
    image_grid(captioned(scored.total, texts, media)[:ON_SHEET]).save(out / "grid.png")
    first = trajectories[0]
    facts = {
        **about,
        "policy_version": first.policy_version,
        "weights": first.fingerprint["weights"],
        "images": len(trajectories),
        "sampling": first.spec.to_json(),
        "versions": first.fingerprint["versions"],
        "command": " ".join(sys.argv[1:]),
    }
    (out / "metrics.json").write_text(json.dumps({"metrics": metrics, **facts}, indent=2) + "\n", encoding="utf-8")
