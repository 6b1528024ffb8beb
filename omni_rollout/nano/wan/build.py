"""`omni-rollout nano build --family wan2_2`: train a nano Wan2.2 until its digits half move and are half read.

    nano's VAE -> Wan's, trained on videos -> two experts, trained from nothing -> the state to ship

What `build(out)` leaves behind:

    out/stages/vae/                           the VAE and its record
    out/stages/experts/step_*/                the averaged weights at every evaluation, and the stage's record
    out/checkpoint/                           the shipped model, in diffusers layout
    out/data/{train,heldout}.jsonl            prompts for RL and for its evaluation
    out/NUMBERS.json                          everything measured on the way
"""

import json
import shutil
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLQwenImage, AutoencoderKLWan, WanPipeline, WanTransformer3DModel

from omni_rollout.models.wan2_2.spec import EXPERTS
from omni_rollout.nano import render
from omni_rollout.nano.random_weights.wan2_2 import make_scheduler, make_text_encoder, make_tokenizer
from omni_rollout.nano.stages import run_stage
from omni_rollout.nano.start import begin, nano_checkpoint
from omni_rollout.nano.states import REPORT_SEED, States, choose_state, state_name
from omni_rollout.nano.transformer import train_transformer
from omni_rollout.nano.wan import scenes
from omni_rollout.nano.wan.data import write_data
from omni_rollout.nano.wan.evaluate import MOVED, accuracy
from omni_rollout.nano.wan.training import BOUNDARY, Experts, WanSettings, make_dataset, make_experts, videos_loss
from omni_rollout.nano.wan.vae import WanVaeSettings, evaluate_vae, grown, train_vae


def build(
    out: Path,
    *,
    seed: int = 0,
    threads: int = 1,
    vae_settings: WanVaeSettings | None = None,
    settings: WanSettings | None = None,
    start: Path | None = None,
) -> Path:
    """Train, or reuse what was trained with the same arguments; these and the package versions decide the weights.

    Args:
        out: working folder, see the module's docstring.
        seed: seeds weights, data and noise.
        threads: torch threads.
        start: a nano Qwen-Image's checkpoint, whose VAE is taken; the recipe's where none is given.

    Returns:
        The shipped checkpoint, `out`/checkpoint.
    """
    vae_settings, settings = vae_settings or WanVaeSettings(), settings or WanSettings()
    start = nano_checkpoint(start, "vae")
    begin(seed, threads)
    asked = {"data": render.digest(), "seed": seed, "threads": threads, "vae": asdict(vae_settings)}
    vae_folder, folder = out / "stages" / "vae", out / "stages" / "experts"
    vae_record = run_stage(vae_folder, asked, lambda folder: _vae_stage(folder, start, vae_settings, seed))
    asked = {**asked, "experts": asdict(settings)}
    pipeline = assemble(vae_folder, settings, seed)
    record = run_stage(folder, asked, lambda folder: _experts_stage(folder, pipeline, settings, seed))

    step = choose_state(record["measured"]["evaluations"], settings.window, MOVED)
    checkpoint = save_checkpoint(pipeline, vae_folder, folder / state_name(step), out / "checkpoint")
    write_data(out / "data")
    numbers = {"vae": vae_record, "experts": record, "shipped_step": step, "shipped": report(checkpoint, settings)}
    (out / "NUMBERS.json").write_text(json.dumps(numbers, indent=1) + "\n")
    return checkpoint


def assemble(vae: Path, settings: WanSettings, seed: int) -> WanPipeline:
    """Wan2.2 around a trained VAE, with a frozen text encoder and untrained experts."""
    tokenizer = make_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        text_encoder = make_text_encoder(len(tokenizer), settings.joint_dim)
    parts: dict[str, Any] = {
        "tokenizer": tokenizer,
        "text_encoder": text_encoder,
        "vae": AutoencoderKLWan.from_pretrained(vae).eval(),
        "scheduler": make_scheduler(),
        **make_experts(settings, seed),
    }
    return WanPipeline(**parts, boundary_ratio=BOUNDARY)


def save_checkpoint(pipeline: WanPipeline, vae: Path, experts: Path, folder: Path) -> Path:
    """Write the checkpoint to `folder`, replacing what is there. What was trained is rounded to bfloat16, as published."""
    if folder.exists():
        shutil.rmtree(folder)
    half: Any = {"torch_dtype": torch.bfloat16}
    trained: dict[str, Any] = {"vae": AutoencoderKLWan.from_pretrained(vae, **half)}
    trained |= {name: WanTransformer3DModel.from_pretrained(experts / name, **half) for name in EXPERTS}
    for part in trained.values():
        part.register_to_config(_name_or_path="")
    kept = {"scheduler": pipeline.scheduler, "text_encoder": pipeline.text_encoder, "tokenizer": make_tokenizer()}
    WanPipeline(**kept, **trained, boundary_ratio=BOUNDARY).save_pretrained(folder)
    return folder


def report(checkpoint: Path, settings: WanSettings) -> dict[str, Any]:
    """Measure what was stored."""
    pipeline = WanPipeline.from_pretrained(checkpoint, torch_dtype=torch.float32)
    experts = Experts({name: getattr(pipeline, name) for name in EXPERTS})
    groups = {"held_out": scenes.HELD_OUT, "trained": scenes.TRAIN}
    images = 2 * settings.evaluation_images
    return {name: accuracy(pipeline, experts, images, REPORT_SEED, tasks) for name, tasks in groups.items()}


def _vae_stage(folder: Path, start: Path, settings: WanVaeSettings, seed: int) -> dict[str, Any]:
    vae = grown(AutoencoderKLQwenImage.from_pretrained(start / "vae"))
    train_vae(vae, settings, seed)
    vae.save_pretrained(folder)
    return evaluate_vae(vae, settings.evaluation_scenes)


def _experts_stage(folder: Path, pipeline: WanPipeline, settings: WanSettings, seed: int) -> dict[str, Any]:
    experts = make_experts(settings, seed)
    states = States(folder, settings, partial(accuracy, pipeline), MOVED)
    loss = partial(videos_loss, experts, make_dataset(pipeline, settings.scenes, seed), settings)
    train_transformer(experts, loss, settings, seed, states.keep)
    return {"evaluations": states.evaluations}
