"""Checkpoints: a folder that is complete or absent, that diffusers can load, and whose every file is checked.

state.json                 kind (full or lora), RunState, sha256 of every other file, and of itself
transformer/               kind full: fp32 master weights, from_pretrained of its class in diffusers reads it
lora/                      kind lora: load_lora_weights of the family's pipeline reads it
transformer_2/, lora_2/    the same of a second expert, where there is one
ema/transformer|lora/      the same for the averaged weights, where an average is kept
old/transformer|lora/      the same for the old policy, where the algorithm has one
optimizer.safetensors      what TrainerEngine.state_dict() gave
rng.safetensors            the process's generators, see `rng.py`
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from omni_rollout.errors import UserError
from omni_rollout.models.base.policy import experts
from omni_rollout.policy.lora import check_fit, has_lora, load_lora, read_lora, save_lora
from omni_rollout.policy.rng import restore_rng, rng_state

FORMAT_VERSION = 2
STATE, OPTIMIZER, RNG = "state.json", "optimizer.safetensors", "rng.safetensors"
WEIGHTS = "diffusion_pytorch_model{suffix}.safetensors"  # diffusers' name; {suffix} numbers the parts of a large model
FILE_SIZE = "5GB"


@dataclass(frozen=True, kw_only=True)
class RunState:
    """Where a run stands after a step, beside its tensors."""

    step: int  # also the policy's version, the data's position and the learning rate's
    weights: str  # digest of what the rollout engine holds
    prompts: str = ""  # sha256 of the training prompts' file
    wandb_id: str | None = None
    lines: Mapping[str, int] = field(default_factory=dict)  # file of the run folder -> lines it had
    config: Mapping[str, Any] = field(default_factory=dict)  # key -> value, flat


@dataclass(frozen=True, kw_only=True)
class Saved:
    """What a checkpoint holds beside the policy; tensors are whole, on the CPU."""

    run: RunState
    average: dict[str, torch.Tensor] | None  # by parameter name, for ExponentialAverage.load
    old: dict[str, torch.Tensor] | None  # likewise, of the old policy
    optimizer: dict[str, torch.Tensor]  # for TrainerEngine.load_state_dict


def save_policy(
    folder: Path,
    transformer: nn.Module,
    weights: Mapping[str, torch.Tensor],
    *,
    run: RunState,
    optimizer: Mapping[str, torch.Tensor],
    average: Mapping[str, torch.Tensor] | None = None,
    old: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Writes a checkpoint beside `folder` and renames it at the end; an older one of that name is replaced.

    Args:
        transformer: asked for its configuration alone; its parameters may be shards.
        weights: the trained parameters by name, whole, as `Learner.state` gives them; `average` and `old` likewise.

    Raises:
        OSError: it could not be written; nothing of it is left, and an older one of that name is still there.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        _save_weights(partial, transformer, weights)
        for name, beside in (("ema", average), ("old", old)):
            if beside is not None:
                _save_weights(partial / name, transformer, beside)
        save_file({name: tensor.contiguous() for name, tensor in optimizer.items()}, partial / OPTIMIZER)
        save_file(rng_state(), partial / RNG)
        digests = {str(path.relative_to(partial)): _digest(path) for path in sorted(partial.rglob("*")) if path.is_file()}
        state = {"format_version": FORMAT_VERSION, "kind": _kind(transformer), "run": asdict(run), "files": digests}
        (partial / STATE).write_text(json.dumps({**state, "sha256": _digest_of(state)}, indent=2))
        for path in [*partial.rglob("*"), partial]:
            _sync(path)
        _replace(partial, folder)
    except SafetensorError as error:  # what a full disk is to safetensors
        raise OSError(f"{partial}: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def load_policy(folder: Path, transformer: nn.Module) -> Saved:
    """Loads a checkpoint into a transformer, in place; do it before a trainer engine is made, which may cut the weights.

    A LoRA checkpoint attaches its adapter where the transformer has none.

    Raises:
        UserError: no checkpoint, a file that is missing or changed, or weights that do not fit the transformer.
    """
    verify(folder)
    if _checked_state(folder)["kind"] == "full" and has_lora(transformer):
        raise UserError(
            f"{folder} holds full weights, this run trains a LoRA adapter; set trainer.lora_rank=0, or resume from another"
        )
    networks = experts(transformer)
    for name, network in networks.items():
        if (folder / "lora").is_dir():
            load_lora(network, folder / _lora_folder(name))
            continue
        tensors = _read_full(folder / name)
        check_fit(folder / name, tensors, network.state_dict())
        network.load_state_dict(tensors)
    average, old = (_read_beside(folder / name, networks) for name in ("ema", "old"))
    return Saved(run=read_state(folder), average=average, old=old, optimizer=load_file(folder / OPTIMIZER))


def _read_beside(folder: Path, networks: Mapping[str, nn.Module]) -> dict[str, torch.Tensor] | None:
    """Another set of the trained parameters, by name; None: there is none."""
    if not folder.is_dir():
        return None
    lora = (folder / "lora").is_dir()
    parts = {name: read_lora(folder / _lora_folder(name)) if lora else _read_full(folder / name) for name in networks}
    return {_prefix(networks, name) + key: tensor for name, tensors in parts.items() for key, tensor in tensors.items()}


def load_generators(folder: Path) -> None:
    """Sets this process's generators to what they were."""
    restore_rng(load_file(folder / RNG))


def read_state(folder: Path) -> RunState:
    """Raises UserError: no checkpoint there, one of another format, or a state.json that is not what was saved."""
    return RunState(**_checked_state(folder)["run"])


def verify(folder: Path) -> RunState:
    """Reads every file of a checkpoint.

    Raises:
        UserError: the first that is missing or not what was saved.
    """
    state = _checked_state(folder)
    for name, digest in state["files"].items():
        path = folder / name
        if not path.is_file():
            raise UserError(f"{path} is missing, though {STATE} lists it: the checkpoint is incomplete; use another")
        if _digest(path) != digest:
            raise UserError(
                f"{path} is not what was saved (its sha256 differs from {STATE}): it is damaged or was edited; use another"
            )
    return RunState(**state["run"])


def _kind(transformer: nn.Module) -> str:
    return "lora" if has_lora(transformer) else "full"


def _save_weights(folder: Path, policy: nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
    networks: dict[str, Any] = dict(experts(policy))
    for name, network in networks.items():
        prefix = _prefix(networks, name)
        own = {key.removeprefix(prefix): tensor for key, tensor in weights.items() if key.startswith(prefix)}
        if has_lora(network):
            save_lora(network, folder / _lora_folder(name), own)
            continue
        network.save_config(folder / name)
        save_torch_state_dict(own, folder / name, filename_pattern=WEIGHTS, max_shard_size=FILE_SIZE)


def _prefix(networks: Mapping[str, nn.Module], name: str) -> str:
    """Of the names of an expert's parameters in the policy."""
    return "" if len(networks) == 1 else f"{name}."


def _lora_folder(expert: str) -> str:
    return "lora" + expert.removeprefix("transformer")


def _read_full(folder: Path) -> dict[str, torch.Tensor]:
    files = sorted(folder.glob("*.safetensors"))
    return {name: tensor for path in files for name, tensor in load_file(path).items()}


def _checked_state(folder: Path) -> dict[str, Any]:
    path = folder / STATE
    if not path.is_file():
        raise UserError(f"{path} does not exist: expected the folder of a checkpoint, such as checkpoints/step_00010")
    try:
        state = json.loads(path.read_text())
        version, digest = state["format_version"], state.pop("sha256", None)
    except (ValueError, LookupError, TypeError) as error:
        raise UserError(f"{path} is not what was saved ({error}): it is damaged or was edited; use another") from error
    if version != FORMAT_VERSION:
        raise UserError(f"{path} has format_version {version}: this version reads {FORMAT_VERSION}")
    if _digest_of(state) != digest:
        raise UserError(f"{path} is not what was saved (its own sha256 differs): it is damaged or was edited; use another")
    return state


def _digest_of(state: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


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
        try:
            os.rename(partial, folder)
        except OSError:
            os.rename(old, folder)
            raise
        shutil.rmtree(old)
    _sync(folder.parent)
