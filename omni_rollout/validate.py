"""Checks across keys, made before a model is loaded: what the types alone cannot say."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path

from omni_rollout.config import (
    Backend,
    OldLogProbs,
    OnMismatch,
    Parity,
    SamplingConfig,
    SDETypeName,
    TrainConfig,
    TrainerEngine,
)
from omni_rollout.errors import UserError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_PROMPT_SUFFIXES = (".txt", ".jsonl", ".parquet")
_WANDB_MODES = ("online", "offline", "disabled")


def validate(config: TrainConfig) -> None:
    """Finds what would make training fail later, all of it at once.

    Raises:
        UserError: one line for each problem: what was given, what is expected, what to do.
    """
    common = [*_numbers(config), *_sampling(config.sampling), *_files(config)]
    _raise([*common, *_learning(config), *_trainer(config), *_guard(config), *_processes(config)])


def validate_model(config: TrainConfig) -> None:
    """`validate` for the checkpoint alone."""
    _raise([problem for problem in _files(config) if problem.startswith("model.path")])


def validate_rollout(config: TrainConfig) -> None:
    """`validate` for sampling alone, where `ode` and groups of one make sense."""
    _raise([*_numbers(config), *_sampling(config.sampling), *_files(config)])


def _raise(problems: list[str]) -> None:
    if problems:
        raise UserError("\n".join(problems))


def _numbers(config: TrainConfig) -> Iterator[str]:
    at_least: dict[str, tuple[float | None, float]] = {
        "collate.prompt_width": (config.collate.prompt_width, 1),
        "collate.negative_prompt_width": (config.collate.negative_prompt_width, 1),
        "sampling.num_inference_steps": (config.sampling.num_inference_steps, 2),
        "sampling.noise_level": (config.sampling.noise_level, 0),
        "sampling.sde_window_size": (config.sampling.sde_window_size, 1),
        "rollout.group_size": (config.rollout.group_size, 1),
        "rollout.prompts_per_step": (config.rollout.prompts_per_step, 1),
        "rollout.max_num_seqs": (config.rollout.max_num_seqs, 1),
        "rollout.workers": (config.rollout.workers, 1),
        "algorithm.kl_coef": (config.algorithm.kl_coef, 0),
        "reward.threads": (config.reward.threads, 1),
        "trainer.ranks": (config.trainer.ranks, 1),
        "trainer.steps": (config.trainer.steps, 0),
        "trainer.warmup_steps": (config.trainer.warmup_steps, 0),
        "trainer.weight_decay": (config.trainer.weight_decay, 0),
        "trainer.updates_per_step": (config.trainer.updates_per_step, 1),
        "trainer.micro_batch_size": (config.trainer.micro_batch_size, 1),
        "trainer.lora_rank": (config.trainer.lora_rank, 0),
        "trainer.save_every": (config.trainer.save_every, 0),
        "evaluation.every": (config.evaluation.every, 0),
        "evaluation.images": (config.evaluation.images, 0),
        "wandb.images": (config.wandb.images, 0),
        "threads": (config.threads, 1),
    }
    for key, (value, minimum) in at_least.items():
        if value is not None and not value >= minimum:
            yield f"{key}={value}: expected at least {minimum}"
    above_zero = {
        "rollout.timeout": config.rollout.timeout,
        "algorithm.advantage_clip": config.algorithm.advantage_clip,
        "trainer.learning_rate": config.trainer.learning_rate,
        "trainer.max_grad_norm": config.trainer.max_grad_norm,
        "trainer.clip_range": config.trainer.clip_range,
    }
    for key, value in above_zero.items():
        if not value > 0:
            yield f"{key}={value}: expected more than 0"
    for key, value in (
        ("trainer.learning_rate", config.trainer.learning_rate),
        ("algorithm.kl_coef", config.algorithm.kl_coef),
    ):
        if not math.isfinite(value):
            yield f"{key}={value}: expected a finite number"


def _sampling(sampling: SamplingConfig) -> Iterator[str]:
    for key, value in (("noise_level", sampling.noise_level), ("true_cfg_scale", sampling.true_cfg_scale)):
        if value is not None and not math.isfinite(value):
            yield f"sampling.{key}={value}: expected a finite number"
    for key, pixels in (("height", sampling.height), ("width", sampling.width)):
        if pixels is not None and (pixels < 16 or pixels % 16):
            yield f"sampling.{key}={pixels}: expected a multiple of 16, at least 16"
    if sampling.true_cfg_scale is not None and not sampling.true_cfg_scale >= 0:
        yield f"sampling.true_cfg_scale={sampling.true_cfg_scale}: expected 0 or more; 1.0 and below turn guidance off"
    if sampling.sde_type is not SDETypeName.ode and sampling.noise_level == 0:
        yield "sampling.noise_level=0: a step without noise has no density; give a level above 0, or sampling.sde_type=ode"
    if sampling.sde_type is SDETypeName.cps and sampling.noise_level > 1:
        yield f"sampling.noise_level={sampling.noise_level}: cps expects 0 to 1 (it is a share of a quarter turn)"
    yield from _window(sampling)


def _window(sampling: SamplingConfig) -> Iterator[str]:
    window, steps, size = sampling.sde_window_range, sampling.num_inference_steps, sampling.sde_window_size
    if window is not None and (len(window) != 2 or not 0 <= window[0] < window[1]):
        yield f"sampling.sde_window_range={window}: expected [first, end] with 0 <= first < end"
        return
    if window is not None and steps is not None and window[1] > steps - 1:
        yield f"sampling.sde_window_range={window}: the last of {steps} steps is deterministic; end at {steps - 1} or before"
    first, end = window if window is not None else (0, None if steps is None else steps - 1)
    if size is not None and end is not None and size > end - first:
        yield f"sampling.sde_window_size={size}: the range has {end - first} steps; give a smaller window or a wider range"


def _learning(config: TrainConfig) -> Iterator[str]:
    if config.sampling.sde_type is SDETypeName.ode:
        yield "sampling.sde_type=ode: draws no noise, so there is nothing to learn from; give sde, cps or dance_sde"
    if config.algorithm.name == "flow_grpo" and config.rollout.group_size == 1:
        yield "rollout.group_size=1: flow_grpo compares the images of one prompt; give 2 or more"
    if config.algorithm.advantage_std not in ("global", "group"):
        yield f"algorithm.advantage_std={config.algorithm.advantage_std}: expected global or group"
    if not any(config.reward.weights.values()):
        yield f"reward.weights={config.reward.weights}: every weight is 0; give one, such as reward=ocr"
    if config.wandb.mode is not None and config.wandb.mode not in _WANDB_MODES:
        yield f"wandb.mode={config.wandb.mode}: expected one of {', '.join(_WANDB_MODES)}, or null"


def _trainer(config: TrainConfig) -> Iterator[str]:
    trainer = config.trainer
    if trainer.engine is TrainerEngine.deepspeed and trainer.zero_stage not in (0, 1, 2):
        yield f"trainer.zero_stage={trainer.zero_stage}: expected 0, 1 or 2; the embedded trainer is a world of one"
    if trainer.lora_alpha is not None and trainer.lora_rank == 0:
        yield f"trainer.lora_alpha={trainer.lora_alpha}: there is no LoRA to scale; give trainer.lora_rank too"
    if trainer.lora_alpha is not None and trainer.lora_alpha < 1:
        yield f"trainer.lora_alpha={trainer.lora_alpha}: expected at least 1"
    if len(trainer.betas) != 2 or not all(0 <= beta < 1 for beta in trainer.betas):
        yield f"trainer.betas={trainer.betas}: expected two numbers, each at least 0 and below 1"
    if not 0 <= trainer.ema_decay < 1:
        yield f"trainer.ema_decay={trainer.ema_decay}: expected at least 0 and below 1; 0 keeps no average"
    images = config.rollout.group_size * config.rollout.prompts_per_step
    if trainer.updates_per_step > images > 0:
        yield f"trainer.updates_per_step={trainer.updates_per_step}: a step has only {images} images to cut"


def _guard(config: TrainConfig) -> Iterator[str]:
    action = config.monitor.on_mismatch
    if action is not OnMismatch.alert and config.parity is Parity.fast:
        yield (
            f"monitor.on_mismatch={action.value} with parity=fast: this profile promises no equal log-probs; "
            "give parity=exact, or monitor.on_mismatch=alert"
        )
    if action is OnMismatch.recompute and config.trainer.old_log_probs is OldLogProbs.recompute:
        yield (
            "monitor.on_mismatch=recompute with trainer.old_log_probs=recompute: every step recomputes already; "
            "leave out one of the two"
        )


def _processes(config: TrainConfig) -> Iterator[str]:
    for key, number in (("rollout.workers", config.rollout.workers), ("trainer.ranks", config.trainer.ranks)):
        if number > 1 and config.backend is Backend.embedded:
            yield f"{key}={number}: backend=embedded is one process; give backend=verl"
    if config.trainer.ranks > 1 and config.trainer.engine is not TrainerEngine.torch:
        yield f"trainer.ranks={config.trainer.ranks}: several ranks need trainer.engine=torch"


def _files(config: TrainConfig) -> Iterator[str]:
    model = Path(config.model.path)
    if not model.is_dir() and (model.is_absolute() or not _HUB_ID.fullmatch(config.model.path)):
        yield f"model.path={config.model.path}: no such folder; give a checkpoint in diffusers layout, or a hub id (owner/name)"
    elif model.is_dir() and not (model / "model_index.json").is_file():
        yield f"model.path={config.model.path}: has no model_index.json, so it is no checkpoint in diffusers layout"
    for key, file in (("prompts", config.prompts), ("evaluation.prompts", config.evaluation.prompts)):
        if file is None:
            continue
        if not Path(file).is_file():
            yield f"{key}={file}: no such file"
        elif Path(file).suffix not in _PROMPT_SUFFIXES:
            yield f"{key}={file}: expected a file that ends in {', '.join(_PROMPT_SUFFIXES)}"
