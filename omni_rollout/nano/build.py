"""`omni-rollout nano build`: train the nano Qwen-Image from nothing and write it as a checkpoint in diffusers layout.

    rendered signs -> VAE -> cached latents -> transformer, a state kept at every evaluation -> the state to ship

What `build(out)` leaves behind:

    out/stages/vae/                     the VAE and its record
    out/stages/transformer/step_*/      the averaged weights at every evaluation, and the stage's record
    out/checkpoint/                     the shipped model, for QwenImagePipeline.from_pretrained
    out/data/{train,heldout}.jsonl      prompts for RL and for its evaluation
    out/NUMBERS.json                    everything measured on the way
"""

import argparse
import dataclasses
import json
import logging
import shutil
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLQwenImage, QwenImagePipeline, QwenImageTransformer2DModel

from omni_rollout.nano import evaluate, render
from omni_rollout.nano.components import make_scheduler, make_text_encoder, make_transformer
from omni_rollout.nano.prompts import Row, write_prompts
from omni_rollout.nano.stages import run_stage
from omni_rollout.nano.start import begin
from omni_rollout.nano.states import REPORT_SEED, States, choose_state, state_name
from omni_rollout.nano.tokenizer import make_tokenizer
from omni_rollout.nano.transformer import TransformerSettings, flow_matching_loss, make_dataset, train_transformer
from omni_rollout.nano.vae import VaeSettings, evaluate_vae, train_vae


@dataclasses.dataclass(frozen=True)
class BuildSettings:
    vae: VaeSettings = dataclasses.field(default_factory=VaeSettings)
    transformer: TransformerSettings = dataclasses.field(default_factory=TransformerSettings)
    report_images: int = 240
    """Images for each measurement on held-out numbers in the final report; half as many for other texts."""


def build(out: Path, *, seed: int = 0, threads: int = 1, settings: BuildSettings | None = None) -> Path:
    """Run or reuse every stage; the same arguments and package versions give the same weights.

    Args:
        out: working folder, see the module's docstring. A finished stage in it is reused if its recorded request is equal.
        seed: seeds weights, data and noise of all stages.
        threads: torch threads. Two are slower than one when anything else runs on a two-core machine.

    Returns:
        The shipped checkpoint, `out`/checkpoint.
    """
    settings = settings or BuildSettings()
    begin(seed, threads)
    vae_asked = {"data": render.digest(), "seed": seed, "threads": threads, "vae": dataclasses.asdict(settings.vae)}
    vae_folder = out / "stages" / "vae"
    vae_record = run_stage(vae_folder, vae_asked, lambda folder: _vae_stage(folder, settings.vae, seed))

    transformer_asked = {**vae_asked, "transformer": dataclasses.asdict(settings.transformer)}
    transformer_folder = out / "stages" / "transformer"
    pipeline = assemble(vae_folder, settings.transformer, seed)
    transformer_record = run_stage(
        transformer_folder,
        transformer_asked,
        lambda folder: _transformer_stage(folder, pipeline, settings.transformer, seed),
    )

    step = choose_state(transformer_record["measured"]["evaluations"], settings.transformer.window)
    pipeline.transformer = QwenImageTransformer2DModel.from_pretrained(transformer_folder / state_name(step))
    checkpoint = save_checkpoint(pipeline, out / "checkpoint")
    write_data(out / "data")
    numbers = {
        "vae": vae_record,
        "transformer": transformer_record,
        "shipped_step": step,
        "shipped": report(pipeline, settings.report_images),
    }
    (out / "NUMBERS.json").write_text(json.dumps(numbers, indent=1) + "\n")
    return checkpoint


def assemble(vae_folder: Path, settings: TransformerSettings, seed: int) -> QwenImagePipeline:
    """The pipeline around a trained VAE, with an untrained transformer."""
    tokenizer = make_tokenizer()
    torch.manual_seed(seed)
    pipeline = QwenImagePipeline(
        scheduler=make_scheduler(),
        vae=AutoencoderKLQwenImage.from_pretrained(vae_folder),
        text_encoder=make_text_encoder(tokenizer, hidden_size=settings.joint_dim, seed=seed),
        tokenizer=tokenizer,
        transformer=make_transformer(
            layers=settings.layers, heads=settings.heads, head_dim=settings.head_dim, joint_dim=settings.joint_dim
        ),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def save_checkpoint(pipeline: QwenImagePipeline, folder: Path) -> Path:
    """Write the pipeline to `folder`, replacing what is there, without the paths its parts were loaded from."""
    for part in (pipeline.vae, pipeline.transformer):
        part.register_to_config(_name_or_path="")
    if folder.exists():
        shutil.rmtree(folder)
    pipeline.save_pretrained(folder)
    return folder


def write_data(folder: Path) -> None:
    """Numbers in every colour: train.jsonl has the trained two-digit numbers, heldout.jsonl those never trained on."""

    def rows(numbers: Iterable[str]) -> Iterator[Row]:
        for number, color in product(numbers, render.COLORS):
            yield {"prompt": render.prompt_for(number, color), "text": number, "color": color}

    write_prompts(folder, {"train": rows(render.TRAIN_NUMBERS), "heldout": rows(render.HELD_OUT)})


def report(pipeline: QwenImagePipeline, images: int) -> dict[str, Any]:
    """Measure one state."""
    held_out = evaluate.cases(render.HELD_OUT, images)
    groups = {"train_numbers": render.TRAIN_NUMBERS, "one_digit": render.DIGITS, "words": render.WORDS}
    result = {
        "held_out": evaluate.accuracy(pipeline, held_out, seed=REPORT_SEED),
        "held_out_guidance_4": evaluate.accuracy(pipeline, held_out, true_cfg_scale=4.0, seed=REPORT_SEED),
    }
    for name, texts in groups.items():
        result[name] = evaluate.accuracy(pipeline, evaluate.cases(texts, images // 2), seed=REPORT_SEED)
    return result


def _vae_stage(folder: Path, settings: VaeSettings, seed: int) -> dict[str, Any]:
    vae = train_vae(settings, seed)
    vae.save_pretrained(folder)
    return evaluate_vae(vae, settings.evaluation_images)


def _transformer_stage(folder: Path, pipeline: QwenImagePipeline, settings: TransformerSettings, seed: int) -> dict[str, Any]:
    transformer = pipeline.transformer

    def look(averaged: QwenImageTransformer2DModel, images: int, seed: int) -> dict[str, Any]:
        pipeline.transformer = averaged
        return evaluate.accuracy(pipeline, evaluate.cases(render.HELD_OUT, images), seed=seed)

    states = States(folder, settings, look)
    data = make_dataset(pipeline, settings.images, seed)
    train_transformer(transformer, partial(flow_matching_loss, transformer, data, settings), settings, seed, states.keep)
    return {"evaluations": states.evaluations}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    build(arguments.out, seed=arguments.seed, threads=arguments.threads)


if __name__ == "__main__":
    main()
