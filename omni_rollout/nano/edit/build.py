"""`omni-rollout nano build --family qwen_image_edit`: train the nano Qwen-Image on pairs of pictures until it half succeeds.

    nano's checkpoint -> its VAE as it is, its transformer trained on to recolour numbers -> the state to ship

What `build(out)` leaves behind:

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
from diffusers import AutoencoderKLQwenImage, QwenImageEditPipeline, QwenImageTransformer2DModel
from transformers import Qwen2Tokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from omni_rollout.models.base.qwen_processor import PILProcessor
from omni_rollout.models.qwen_image_edit.spec import PIPELINE, TEMPLATE, TEMPLATE_PREFIX_TOKENS
from omni_rollout.nano import render
from omni_rollout.nano.components import make_scheduler, make_text_encoder
from omni_rollout.nano.edit.data import write_data
from omni_rollout.nano.edit.evaluate import RECOLOURED, accuracy
from omni_rollout.nano.edit.training import EditSettings, edit_loss, make_pairs
from omni_rollout.nano.random_weights.with_processor import PREPROCESSOR, save
from omni_rollout.nano.stages import run_stage
from omni_rollout.nano.start import begin, nano_checkpoint
from omni_rollout.nano.states import REPORT_SEED, States, choose_state, state_name
from omni_rollout.nano.tokenizer import make_tokenizer
from omni_rollout.nano.transformer import train_transformer


def build(
    out: Path, *, seed: int = 0, threads: int = 1, settings: EditSettings | None = None, start: Path | None = None
) -> Path:
    """Train, or reuse what was trained with the same arguments; these and the package versions decide the weights.

    Args:
        out: working folder, see the module's docstring.
        seed: seeds the text encoder, data and noise.
        threads: torch threads.
        start: a nano Qwen-Image's checkpoint, the recipe's where none is given.

    Returns:
        The shipped checkpoint, `out`/checkpoint.
    """
    settings, start = settings or EditSettings(), nano_checkpoint(start, "transformer")
    begin(seed, threads)
    asked = {"data": render.digest(), "seed": seed, "threads": threads, "settings": asdict(settings)}
    pipeline, folder = assemble(start, seed), out / "stages" / "transformer"
    record = run_stage(folder, asked, lambda folder: _train(folder, pipeline, settings, seed))

    step = choose_state(record["measured"]["evaluations"], settings.window, RECOLOURED)
    # Rounded to bfloat16, as the published one is: half the size.
    shipped = QwenImageTransformer2DModel.from_pretrained(folder / state_name(step), torch_dtype=torch.bfloat16)
    checkpoint = save_checkpoint(pipeline, shipped, start, out / "checkpoint")
    write_data(out / "data")
    stored = QwenImageTransformer2DModel.from_pretrained(checkpoint / "transformer", torch_dtype=torch.float32)
    numbers = {"transformer": record, "shipped_step": step, "shipped": report(pipeline, stored, settings)}
    (out / "NUMBERS.json").write_text(json.dumps(numbers, indent=1) + "\n")
    return checkpoint


def make_edit_tokenizer() -> Qwen2Tokenizer:
    # What stands behind the place for the picture is there for the corpus alone: its words become tokens.
    return make_tokenizer(TEMPLATE.format("{}", "make it"), TEMPLATE_PREFIX_TOKENS)


def assemble(start: Path, seed: int) -> QwenImageEditPipeline:
    """Qwen-Image-Edit around the VAE and the transformer of `start`, with a tokenizer and a frozen text encoder of its own."""
    transformer = QwenImageTransformer2DModel.from_pretrained(start / "transformer")
    tokenizer = make_edit_tokenizer()
    processor: Any = PILProcessor(Qwen2VLImageProcessorPil(**PREPROCESSOR), tokenizer)
    return QwenImageEditPipeline(
        scheduler=make_scheduler(),
        vae=AutoencoderKLQwenImage.from_pretrained(start / "vae"),
        text_encoder=make_text_encoder(tokenizer, hidden_size=transformer.config["joint_attention_dim"], seed=seed),
        tokenizer=tokenizer,
        processor=processor,
        transformer=transformer,
    )


def save_checkpoint(
    pipeline: QwenImageEditPipeline, transformer: QwenImageTransformer2DModel, start: Path, folder: Path
) -> Path:
    """Write the checkpoint to `folder`, replacing what is there.

    The VAE is a copy of `start`'s, byte for byte, of which git keeps one.
    """
    if folder.exists():
        shutil.rmtree(folder)
    transformer.register_to_config(_name_or_path="")
    parts = {name: getattr(pipeline, name) for name in ("scheduler", "text_encoder", "vae")}
    fresh = make_edit_tokenizer()  # one that was used keeps how it padded, and would be saved with it
    save(folder, PIPELINE, {**parts, "tokenizer": fresh, "transformer": transformer})
    shutil.rmtree(folder / "vae")
    shutil.copytree(start / "vae", folder / "vae")
    return folder


def report(pipeline: QwenImageEditPipeline, transformer: QwenImageTransformer2DModel, settings: EditSettings) -> dict[str, Any]:
    groups = {"held_out": render.HELD_OUT, "train_numbers": render.TRAIN_NUMBERS, "one_digit": render.DIGITS}
    images = 2 * settings.evaluation_images
    return {name: accuracy(pipeline, transformer, images, REPORT_SEED, texts) for name, texts in groups.items()}


def _train(folder: Path, pipeline: QwenImageEditPipeline, settings: EditSettings, seed: int) -> dict[str, Any]:
    transformer = pipeline.transformer
    states = States(folder, settings, partial(accuracy, pipeline), RECOLOURED)
    loss = partial(edit_loss, transformer, make_pairs(pipeline, settings.pairs, seed), settings)
    train_transformer(transformer, loss, settings, seed, states.keep)
    return {"evaluations": states.evaluations}
