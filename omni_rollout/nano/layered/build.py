"""`omni-rollout nano build --family qwen_image_layered`: train the nano Qwen-Image on until it half takes pictures apart.

    nano's checkpoint -> its VAE with alpha -> its transformer, trained on to lay numbers off their ground -> the state to ship

What `build(out)` leaves behind:

    out/stages/vae/                           the VAE and its record
    out/stages/transformer/step_*/            the averaged weights at every evaluation, and the stage's record
    out/checkpoint/                           the shipped model, in diffusers layout
    out/data/{train,heldout}.jsonl, images/   prompts for RL and for its evaluation
    out/NUMBERS.json                          everything measured on the way
"""

import json
import shutil
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLQwenImage, QwenImagePipeline, QwenImageTransformer2DModel

from omni_rollout.models.qwen_image_layered.spec import PIPELINE
from omni_rollout.nano import render
from omni_rollout.nano.layered.data import write_data
from omni_rollout.nano.layered.evaluate import LAYERED, accuracy
from omni_rollout.nano.layered.training import LayeredSettings, grown, layered_loss, make_dataset
from omni_rollout.nano.layered.vae import LayeredVaeSettings, evaluate_vae, train_vae
from omni_rollout.nano.layered.vae import grown as grown_vae
from omni_rollout.nano.random_weights.with_processor import save
from omni_rollout.nano.stages import run_stage
from omni_rollout.nano.start import begin, nano_checkpoint
from omni_rollout.nano.states import REPORT_SEED, States, choose_state, state_name
from omni_rollout.nano.tokenizer import make_tokenizer
from omni_rollout.nano.transformer import train_transformer


def build(
    out: Path,
    *,
    seed: int = 0,
    threads: int = 1,
    vae_settings: LayeredVaeSettings | None = None,
    settings: LayeredSettings | None = None,
    start: Path | None = None,
) -> Path:
    """Train, or reuse what was trained with the same arguments; these and the package versions decide the weights.

    Args:
        out: working folder, see the module's docstring.
        seed: seeds data and noise.
        threads: torch threads.
        start: a nano Qwen-Image's checkpoint, the recipe's where none is given.

    Returns:
        The shipped checkpoint, `out`/checkpoint.
    """
    vae_settings, settings = vae_settings or LayeredVaeSettings(), settings or LayeredSettings()
    start = nano_checkpoint(start, "transformer")
    begin(seed, threads)
    pipeline = QwenImagePipeline.from_pretrained(start)
    asked = {"data": render.digest(), "seed": seed, "threads": threads, "vae": asdict(vae_settings)}
    vae_folder, folder = out / "stages" / "vae", out / "stages" / "transformer"
    vae_record = run_stage(vae_folder, asked, lambda folder: _vae_stage(folder, pipeline.vae, vae_settings, seed))
    vae = AutoencoderKLQwenImage.from_pretrained(vae_folder).eval()
    asked = {**asked, "transformer": asdict(settings)}
    record = run_stage(folder, asked, lambda folder: _transformer_stage(folder, pipeline, vae, settings, seed))

    step = choose_state(record["measured"]["evaluations"], settings.window, LAYERED)
    checkpoint = save_checkpoint(start, pipeline, vae_folder, folder / state_name(step), out / "checkpoint")
    write_data(out / "data")
    numbers = {
        "vae": vae_record,
        "transformer": record,
        "shipped_step": step,
        "shipped": report(pipeline, checkpoint, settings),
    }
    (out / "NUMBERS.json").write_text(json.dumps(numbers, indent=1) + "\n")
    return checkpoint


def save_checkpoint(start: Path, pipeline: QwenImagePipeline, vae: Path, transformer: Path, folder: Path) -> Path:
    """Write the checkpoint to `folder`, replacing what is there.

    What was trained is rounded to bfloat16, as published: half the size. The text encoder is a copy of `start`'s, byte for
    byte, of which git keeps one.
    """
    if folder.exists():
        shutil.rmtree(folder)
    half: Any = {"torch_dtype": torch.bfloat16}
    trained = {
        "vae": AutoencoderKLQwenImage.from_pretrained(vae, **half),
        "transformer": QwenImageTransformer2DModel.from_pretrained(transformer, **half),
    }
    for part in trained.values():
        part.register_to_config(_name_or_path="")
    fresh = make_tokenizer()  # one that was used keeps how it padded, and would be saved with it
    parts = {"scheduler": pipeline.scheduler, "text_encoder": pipeline.text_encoder, "tokenizer": fresh}
    save(folder, PIPELINE, {**parts, **trained})
    for name in ("text_encoder", "tokenizer"):
        shutil.rmtree(folder / name)
        shutil.copytree(start / name, folder / name)
    return folder


def report(pipeline: QwenImagePipeline, checkpoint: Path, settings: LayeredSettings) -> dict[str, Any]:
    """Measure what was stored."""
    vae = AutoencoderKLQwenImage.from_pretrained(checkpoint / "vae", torch_dtype=torch.float32)
    transformer = QwenImageTransformer2DModel.from_pretrained(checkpoint / "transformer", torch_dtype=torch.float32)
    groups = {"held_out": render.HELD_OUT, "train_numbers": render.TRAIN_NUMBERS, "one_digit": render.DIGITS}
    images = 2 * settings.evaluation_images
    return {name: accuracy(pipeline, vae, transformer, images, REPORT_SEED, texts) for name, texts in groups.items()}


def _vae_stage(folder: Path, start: AutoencoderKLQwenImage, settings: LayeredVaeSettings, seed: int) -> dict[str, Any]:
    vae = grown_vae(start)
    train_vae(vae, settings, seed)
    vae.save_pretrained(folder)
    return evaluate_vae(vae, settings.evaluation_signs)


def _transformer_stage(
    folder: Path, pipeline: QwenImagePipeline, vae: AutoencoderKLQwenImage, settings: LayeredSettings, seed: int
) -> dict[str, Any]:
    transformer = grown(pipeline.transformer)
    states = States(folder, settings, partial(accuracy, pipeline, vae), LAYERED)
    loss = partial(layered_loss, transformer, make_dataset(pipeline, vae, settings.signs, seed), settings)
    train_transformer(transformer, loss, settings, seed, states.keep)
    return {"evaluations": states.evaluations}
