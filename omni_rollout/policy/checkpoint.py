"""Checkpoints: a folder that is complete or absent, that diffusers can load, and whose every file is checked.

state.json                 step, kind (full or lora), sha256 of every other file
transformer/               kind full: fp32 master weights, QwenImageTransformer2DModel.from_pretrained reads it
lora/                      kind lora: QwenImagePipeline.load_lora_weights reads it
ema/transformer|lora/      the same for the averaged weights, where an average is kept
optimizer.safetensors      what TrainerEngine.state_dict() gave, where it was given
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from omni_rollout.errors import UserError
from omni_rollout.policy.ema import ExponentialAverage
from omni_rollout.policy.lora import check_fit, has_lora, load_lora, save_lora

FORMAT_VERSION = 1
STATE, OPTIMIZER = "state.json", "optimizer.safetensors"


@dataclass(frozen=True)
class SavedState:
    """What a checkpoint holds beside the policy."""

    step: int
    optimizer: dict[str, torch.Tensor] | None  # for TrainerEngine.load_state_dict


def save_policy(
    folder: Path,
    transformer: nn.Module,
    *,
    step: int,
    ema: ExponentialAverage | None = None,
    optimizer: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Writes a checkpoint beside `folder` and renames it at the end; an older one of that name is replaced.

    Saves the LoRA factors where the transformer has an adapter, all weights otherwise.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    _save_weights(partial, transformer)
    if ema is not None:
        with ema.swapped():
            _save_weights(partial / "ema", transformer)
    if optimizer is not None:
        save_file({name: tensor.contiguous() for name, tensor in optimizer.items()}, partial / OPTIMIZER)
    digests = {str(path.relative_to(partial)): _digest(path) for path in sorted(partial.rglob("*")) if path.is_file()}
    state = {"format_version": FORMAT_VERSION, "step": step, "kind": _kind(transformer), "files": digests}
    (partial / STATE).write_text(json.dumps(state, indent=2))
    for path in [*partial.rglob("*"), partial]:
        _sync(path)
    _replace(partial, folder)


def load_policy(folder: Path, transformer: nn.Module, *, ema: ExponentialAverage | None = None) -> SavedState:
    """Loads a checkpoint into a transformer, in place; do it before a trainer engine is made, which may copy the weights.

    A LoRA checkpoint attaches its adapter where the transformer has none. `ema` is loaded too, or starts at the loaded
    weights where the checkpoint keeps no average.

    Raises:
        UserError: no checkpoint, a file that is missing or changed, or weights that do not fit the transformer.
    """
    state = _checked_state(folder)
    if state["kind"] == "full" and has_lora(transformer):
        raise UserError(
            f"{folder} holds full weights, this run trains a LoRA adapter; set trainer.lora_rank=0, or resume from another"
        )
    if ema is not None and (folder / "ema").is_dir():
        _load_weights(folder / "ema", transformer)
        ema.restart()
    _load_weights(folder, transformer)
    if ema is not None and not (folder / "ema").is_dir():
        ema.restart()
    optimizer = load_file(folder / OPTIMIZER) if OPTIMIZER in state["files"] else None
    return SavedState(step=state["step"], optimizer=optimizer)


def _kind(transformer: nn.Module) -> str:
    return "lora" if has_lora(transformer) else "full"


def _save_weights(folder: Path, transformer: Any) -> None:
    if has_lora(transformer):
        save_lora(transformer, folder / "lora")
    else:
        transformer.save_pretrained(folder / "transformer")


def _load_weights(folder: Path, transformer: nn.Module) -> None:
    if (folder / "lora").is_dir():
        load_lora(transformer, folder / "lora")
        return
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted((folder / "transformer").glob("*.safetensors")):
        tensors.update(load_file(path))
    check_fit(folder / "transformer", tensors, transformer.state_dict())
    transformer.load_state_dict(tensors)


def _checked_state(folder: Path) -> dict[str, Any]:
    if not (folder / STATE).is_file():
        raise UserError(
            f"{folder / STATE} does not exist: expected the folder of a checkpoint, such as checkpoints/step_000010"
        )
    state = json.loads((folder / STATE).read_text())
    if state["format_version"] != FORMAT_VERSION:
        raise UserError(f"{folder / STATE} has format_version {state['format_version']}: this version reads {FORMAT_VERSION}")
    for name, digest in state["files"].items():
        path = folder / name
        if not path.is_file():
            raise UserError(f"{path} is missing, though {STATE} lists it: the checkpoint is incomplete; use another")
        if _digest(path) != digest:
            raise UserError(
                f"{path} is not what was saved (its sha256 differs from {STATE}): it is damaged or was edited; use another"
            )
    return state


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _replace(partial: Path, folder: Path) -> None:
    if not folder.exists():
        os.rename(partial, folder)
    else:
        old = folder.with_name(f".{folder.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        os.rename(folder, old)
        os.rename(partial, folder)
        shutil.rmtree(old)
    _sync(folder.parent)
