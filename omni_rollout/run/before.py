"""A run before torch is loaded: what can be found wrong with it by then, and what is said of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from omni_rollout.algorithms import get_algorithm
from omni_rollout.config import Schedule, TrainConfig
from omni_rollout.data.stream import prompt_data, to_score
from omni_rollout.errors import UserError
from omni_rollout.models import family_module
from omni_rollout.rewards import make_rewards
from omni_rollout.rollout.start import many, sampling_words
from omni_rollout.run.start import find_start
from omni_rollout.run.widths import check_widths, collator_of, quick_tokenizer


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """How many there are."""

    training: int
    evaluation: int
    fit: bool  # their widths; False: it takes the checkpoint's own tokenizer to tell


def check_before(config: TrainConfig) -> Prompts:
    """Reads the prompt files and asks the rewards whether they can score them, the tokenizer whether they fit, and the run
    folder whether it is free.

    Raises:
        UserError: the first that is wrong.
    """
    if config.trainer.resume != "auto":  # that one reads whole checkpoints, and is for the run itself to say
        find_start(config)
    stream, held_out = prompt_data(config)
    kind = family_module(config.model.family, "spec").KIND
    prompts = [*stream.prompts, *held_out]
    make_rewards(config).check(to_score(prompts), kind)
    tokenizer = quick_tokenizer(config.model.path)
    fit = tokenizer is not None and not any(prompt.images for prompt in prompts)  # how wide an image is, its processor says
    if fit:
        try:
            check_widths(collator_of(config, tokenizer), stream.prompts, held_out)
        except UserError:  # seldom enough to ask the checkpoint's own, which takes seconds
            from transformers import AutoTokenizer

            own = AutoTokenizer.from_pretrained(config.model.path, subfolder="tokenizer")
            check_widths(collator_of(config, own), stream.prompts, held_out)
    return Prompts(training=len(stream.prompts), evaluation=len(held_out), fit=fit)


def header(config: TrainConfig, prompts: Prompts) -> Iterator[str]:
    """What is going to be trained, a line for each thing that people ask of a run."""
    trainer, rollout, evaluation = config.trainer, config.rollout, config.evaluation
    what = f"LoRA of rank {trainer.lora_rank}" if trainer.lora_rank else "full weights"
    images = rollout.prompts_per_step * rollout.group_size
    again = "; a step takes more prompts than there are, so they repeat" if rollout.prompts_per_step > prompts.training else ""
    often = f"before, after, and every {evaluation.every} steps" if evaluation.every else "before and after"
    saved = f"every {trainer.save_every} steps and at the end" if trainer.save_every else "at the end"
    rewards = ", ".join(f"{name} ({weight:g})" for name, weight in config.reward.weights.items())
    yield f"policy      {what} of {config.model.path}, {config.algorithm.name}, {config.backend.value}"
    yield f"prompts     {config.prompts}: {many(prompts.training, 'prompt')}{again}"
    columns = get_algorithm(config.algorithm).targets
    how = f"of {', '.join(columns)}, encoded; nothing is sampled" if columns else sampling_words(config)
    yield f"a step      {rollout.prompts_per_step} prompts x {rollout.group_size} images = {images}: {how}"
    yield f"update      {many(trainer.updates_per_step, 'update')} a step, {_rate(config)}, clip range {trainer.clip_range:g}"
    yield f"reward      {rewards}{': evaluations alone' if columns else ''}"
    if evaluation.images:
        from_file = config.evaluation.prompts or "the training prompts"
        yield f"evaluation  {many(evaluation.images, 'image')} of {from_file}, {often}: deterministic, the same seeds"
    else:
        yield "evaluation  none: the training reward alone will not tell whether it generalises; evaluation.images=N"
    yield f"run         {many(trainer.steps, 'step')}, seed {config.sampling.seed}, into {config.run_dir}; saved {saved}"


def _rate(config: TrainConfig) -> str:
    """The learning rate with its warm-up, and how far that gets in a run shorter than it."""
    trainer = config.trainer
    rate = f"learning rate {trainer.learning_rate:g}"
    if trainer.warmup_steps:
        rate += f" after {many(trainer.warmup_steps, 'step')} of warm-up"
    if 0 < trainer.steps < trainer.warmup_steps:
        rate += f" (these {trainer.steps} reach {trainer.learning_rate * trainer.steps / trainer.warmup_steps:g})"
    return rate + (", then falling to a tenth" if trainer.schedule is Schedule.linear else "")
