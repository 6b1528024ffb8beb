"""Checks across keys, made before a model is loaded: what the types alone cannot say."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from huggingface_hub import constants, try_to_load_from_cache

from omni_rollout.algorithms import algorithm_class, get_algorithm
from omni_rollout.config import (
    AUTO,
    Offload,
    OldLogProbs,
    OnMismatch,
    Parity,
    Reduce,
    TrainConfig,
    TrainerConfig,
    TrainerEngineName,
)
from omni_rollout.errors import UserError
from omni_rollout.launch import ahead, model_files
from omni_rollout.launch.outputs import file_problem, folder_problem
from omni_rollout.launch.processes import max_num_seqs_problems, process_problems
from omni_rollout.launch.sampling import sampling_problems, width_problems
from omni_rollout.launch.sources import prompt_problems, reward_problems, target_problems, unknown
from omni_rollout.models import families

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_LARGEST = 2**31 - 1  # more is a slip of the hand, and would end in some library's overflow
_WANDB_MODES = ("online", "offline", "disabled")


def validate(config: TrainConfig) -> None:
    """Finds what would make training fail later, all of it at once.

    Raises:
        UserError: one line for each problem: what was given, what is expected, what to do.
    """
    common = [*_numbers(config), *sampling_problems(config.sampling), *_model(config), *prompt_problems(config)]
    common += width_problems(config)
    own = [*_learning(config), *reward_problems(config), *_trainer(config), *_guard(config), *process_problems(config)]
    _raise([*common, *own, *max_num_seqs_problems(config), *ahead.problems(config), *_folder("run_dir", config.run_dir)])


def validate_rollout(config: TrainConfig, out: str) -> None:
    """`validate` for sampling alone, where `ode` and groups of one make sense; `out`: the folder for its images."""
    common = [*_numbers(config), *sampling_problems(config.sampling), *_model(config), *prompt_problems(config)]
    common += width_problems(config)
    _raise([*common, *_folder("out", out, new=True)])


def validate_evaluate(config: TrainConfig, out: str) -> None:
    """`validate` for held-out images, of `config.prompts`, alone."""
    common = [
        *_numbers(config),
        *sampling_problems(config.sampling),
        *_model(config),
        *prompt_problems(config),
        *reward_problems(config),
    ]
    _raise([*common, *_folder("out", out, new=True)])


def validate_export(config: TrainConfig, out: str) -> None:
    _raise([*_model(config), *_folder("--out", out, new=True)])


def validate_scoring(config: TrainConfig, files: Mapping[str, Path | None], *, path_needed: bool = True) -> None:
    """`validate` for `parity` and `replay`, which read no prompts; `files`: option -> what it is to write, if given.

    Args:
        path_needed: False: an empty `model.path` stands for a random model of the family.
    """
    written = [
        f"{option} {path}: {problem}"
        for option, path in files.items()
        if path is not None and (problem := file_problem(path)) is not None
    ]
    sampling = replace(config.sampling, sde_window_range=None, sde_window_size=None)  # they score every step: no window is read
    model = _model(config) if path_needed or config.model.path else unknown("model.family", config.model.family, families())
    _raise([*_numbers(config), *sampling_problems(sampling), *model, *written])


def validate_serving(config: TrainConfig) -> None:
    port = [] if config.serve.port < 2**16 else [f"serve.port={config.serve.port}: expected 0 to 65535"]
    _raise([*_numbers(config), *sampling_problems(config.sampling), *width_problems(config), *_model(config), *port])


def validate_plan(config: TrainConfig) -> None:
    """`validate` for `plan`, which reads neither prompts nor weights."""
    own = [*_trainer(config), *process_problems(config), *ahead.problems(config), *width_problems(config)]
    _raise([*_numbers(config), *sampling_problems(config.sampling), *own])


def _raise(problems: list[str]) -> None:
    if problems:
        raise UserError("\n".join(problems))


def _numbers(config: TrainConfig) -> Iterator[str]:
    yield from _in_flight(config.rollout.max_num_seqs)
    at_least: dict[str, tuple[float | None, float]] = {
        "collate.prompt_width": (config.collate.prompt_width, 1),
        "collate.negative_prompt_width": (config.collate.negative_prompt_width, 1),
        "sampling.num_inference_steps": (config.sampling.num_inference_steps, 2),
        "sampling.noise_level": (config.sampling.noise_level, 0),
        "sampling.sde_window_size": (config.sampling.sde_window_size, 1),
        "rollout.group_size": (config.rollout.group_size, 1),
        "rollout.prompts_per_step": (config.rollout.prompts_per_step, 1),
        "rollout.workers": (config.rollout.workers, 1),
        "algorithm.kl_coef": (config.algorithm.kl_coef, 0),
        "reward.threads": (config.reward.threads, 1),
        "trainer.ranks": (config.trainer.ranks, 1),
        "trainer.steps": (config.trainer.steps, 0),
        "trainer.warmup_steps": (config.trainer.warmup_steps, 0),
        "trainer.weight_decay": (config.trainer.weight_decay, 0),
        "trainer.updates_per_step": (config.trainer.updates_per_step, 1),
        "trainer.micro_batch_size": (config.trainer.micro_batch_size, 1),
        "trainer.micro_batch_tokens": (config.trainer.micro_batch_tokens, 1),
        "trainer.lora_rank": (config.trainer.lora_rank, 0),
        "trainer.save_every": (config.trainer.save_every, 0),
        "trainer.keep_checkpoints": (config.trainer.keep_checkpoints, 0),
        "launch.max_restarts": (config.launch.max_restarts, 0),
        "evaluation.every": (config.evaluation.every, 0),
        "evaluation.images": (config.evaluation.images, 0),
        "wandb.images": (config.wandb.images, 0),
        "launch.cpus": (config.launch.cpus, 1),
        "launch.nodes": (config.launch.nodes, 1),
        "launch.gpus_per_node": (config.launch.gpus_per_node, 0),
        "launch.cpus_per_task": (config.launch.cpus_per_task, 1),
        "launch.object_store_mb": (config.launch.object_store_mb, 128),
        "threads": (config.threads, 1),
        "profile_step": (config.profile_step, 1),
        "serve.port": (config.serve.port, 0),
        **{f"serve.{name}": (value, 1) for name, value in vars(config.serve).items() if name.startswith("max_")},
    }
    for key, (value, minimum) in at_least.items():
        if value is not None and not value >= minimum:
            yield f"{key}={value}: expected at least {minimum}"
        elif value is not None and value > _LARGEST:
            yield f"{key}={value}: expected at most {_LARGEST}"
    above_zero = {
        **{f"{part}.timeout": getattr(config, part).timeout for part in ("rollout", "reward", "serve", "launch")},
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
        ("trainer.weight_decay", config.trainer.weight_decay),
    ):
        if not math.isfinite(value):
            yield f"{key}={value}: expected a finite number"


def _in_flight(number: Any) -> Iterator[str]:
    if number != AUTO and (not isinstance(number, int) or isinstance(number, bool) or not 1 <= number <= _LARGEST):
        yield f"rollout.max_num_seqs={number}: expected at least 1 and at most {_LARGEST}, or auto"


def _learning(config: TrainConfig) -> Iterator[str]:
    try:
        algorithm_class(config.algorithm.name, config.algorithm.source)  # is there one?
        algorithm = get_algorithm(config.algorithm)
        yield from algorithm.problems(config)
        if config.model.family in families():
            yield from target_problems(config, algorithm.targets)
    except UserError as error:
        yield str(error)
    if config.wandb.mode is not None and config.wandb.mode not in _WANDB_MODES:
        yield f"wandb.mode={config.wandb.mode}: expected one of {', '.join(_WANDB_MODES)}, or null"


def _trainer(config: TrainConfig) -> Iterator[str]:
    trainer = config.trainer
    yield from trainer_engine(trainer)
    if trainer.fit not in ("none", AUTO):
        yield f"trainer.fit={trainer.fit}: expected none or auto"
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


def trainer_engine(trainer: TrainerConfig) -> Iterator[str]:
    """What is wrong with the choice of engine, ZeRO stage, offload and ranks."""
    engine, stage, offload = trainer.engine, trainer.zero_stage, trainer.offload
    if (deepspeed := engine is TrainerEngineName.deepspeed) and stage not in (0, 1, 2, 3):
        yield f"trainer.zero_stage={stage}: expected 0, 1, 2 or 3"
    if engine is TrainerEngineName.fsdp2 and trainer.ranks == 1:
        yield "trainer.engine=fsdp2: one rank has nothing to cut; give trainer.ranks (backend=verl), or trainer.engine=torch"
    if trainer.reduce is Reduce.backward and engine is not TrainerEngineName.fsdp2:
        yield "trainer.reduce=backward: needs trainer.engine=fsdp2; of deepspeed, trainer.zero_stage=2 and 3 do so anyway"
    alone = engine is TrainerEngineName.torch and trainer.ranks == 1
    if offload is Offload.optimizer and not (alone or (deepspeed and stage > 0)):
        yield "trainer.offload=optimizer: needs one rank of torch, or deepspeed with trainer.zero_stage of 1, 2 or 3"
    if offload is Offload.all and not (alone or engine is TrainerEngineName.fsdp2 or (deepspeed and stage == 3)):
        yield (
            "trainer.offload=all: needs one rank of torch, trainer.engine=fsdp2, "
            "or trainer.engine=deepspeed with trainer.zero_stage=3"
        )


def _guard(config: TrainConfig) -> Iterator[str]:
    if config.monitor.tensorboard and find_spec("tensorboard") is None:
        yield "monitor.tensorboard=true: the package is not installed: pip install tensorboard, or leave it out"
    action = config.monitor.on_mismatch
    if action is not OnMismatch.alert and config.parity is Parity.fast:
        yield (
            f"monitor.on_mismatch={action.value} with parity=fast: this profile promises no equal log-probs; "
            "give parity=exact, or monitor.on_mismatch=alert"
        )
    if action is OnMismatch.recompute and config.rollout.ahead:
        yield "monitor.on_mismatch=recompute with rollout.ahead=1: every step recomputes already; leave monitor.on_mismatch out"
    elif action is OnMismatch.recompute and config.trainer.old_log_probs is OldLogProbs.recompute:
        yield (
            "monitor.on_mismatch=recompute with trainer.old_log_probs=recompute: every step recomputes already; "
            "leave out one of the two"
        )


def _model(config: TrainConfig) -> Iterator[str]:
    yield from unknown("model.family", config.model.family, families())
    model = Path(config.model.path)
    if os.path.isdir(model):
        family = config.model.family if config.model.family in families() else "qwen_image"
        yield from (f"model.path={model}: {problem}" for problem in model_files.problems(model, family, config.sampling.extra))
    elif model.is_absolute() or not _HUB_ID.fullmatch(config.model.path):
        yield f"model.path={config.model.path}: no such folder; give a checkpoint in diffusers layout, or a hub id (owner/name)"
    elif constants.HF_HUB_OFFLINE and not isinstance(try_to_load_from_cache(config.model.path, model_files.INDEX), str):
        yield f"model.path={config.model.path}: not in the hub's cache, and HF_HUB_OFFLINE is set; unset it, or give a folder"


def _folder(key: str, path: str, *, new: bool = False) -> Iterator[str]:
    if not path.strip():
        yield f"{key} is empty: give {key}=FOLDER"
    elif (problem := folder_problem(Path(path), new=new)) is not None:
        yield f"{key}={path}: {problem}"
