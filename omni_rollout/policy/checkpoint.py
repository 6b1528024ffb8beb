"""Checkpoints: a folder that is complete or absent, that diffusers can load, and whose every file is checked.

state.json                 kind (full or lora), RunState, sha256 of every other file, and of itself
transformer/               kind full: fp32 master weights, from_pretrained of its class in diffusers reads it
lora/                      kind lora: load_lora_weights of the family's pipeline reads it
transformer_2/, lora_2/    the same of a second expert, where there is one
ema/transformer|lora/      the same for the averaged weights, where an average is kept
old/transformer|lora/      the same for the old policy, where the algorithm has one
behaviour/transformer|lora/  the same for the policy that samples the next batch, with rollout.ahead=1
optimizer.safetensors      what TrainerEngine.state_dict() gave, made whole
rng.safetensors            the process's generators, see `rng.py`
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from omni_rollout.errors import UserError
from omni_rollout.models.base.policy import experts
from omni_rollout.policy.lora import check_fit, has_lora, load_lora, read_lora, save_lora
from omni_rollout.policy.rng import restore_rng, rng_state
from omni_rollout.policy.state import BEHAVIOUR, EMA, LORA, OLD, RunState, kind_of, read_state, verify, write_state
from omni_rollout.policy.tensor_files import Part, Pending, file_part, first_rank, pending, write_parts

CONFIG = "config.json"  # diffusers' name
OPTIMIZER, RNG = "optimizer.safetensors", "rng.safetensors"
WEIGHTS = "diffusion_pytorch_model{suffix}.safetensors"  # diffusers' name; {suffix} numbers the parts of a large model
INDEX = f"{WEIGHTS.format(suffix='')}.index.json"  # where there are several parts
FILE_SIZE = "5GB"


@dataclass(frozen=True, kw_only=True)
class Saved:
    """What a checkpoint holds beside the policy; tensors are whole, on the CPU."""

    run: RunState
    average: dict[str, torch.Tensor] | None  # by parameter name, for ExponentialAverage.load
    old: dict[str, torch.Tensor] | None  # likewise, of the old policy
    behaviour: dict[str, torch.Tensor] | None  # likewise, of the one that samples the next batch
    optimizer: dict[str, torch.Tensor]  # for TrainerEngine.load_state_dict


def save_policy(
    folder: Path,
    transformer: nn.Module,
    weights: Mapping[str, Pending],
    *,
    run: RunState,
    optimizer: Mapping[str, Pending],
    average: Mapping[str, Pending] | None = None,
    old: Mapping[str, Pending] | None = None,
    behaviour: Mapping[str, Pending] | None = None,
) -> None:
    """Writes a checkpoint beside `folder` and renames it at the end; an older one of that name is replaced.

    Collective: the first rank writes, and has one tensor whole at a time; of a LoRA all factors.

    Args:
        transformer: asked for its configuration alone; its parameters may be shards.
        weights: the trained parameters by name, as `Learner.state` gives them; the three last likewise.

    Raises:
        OSError: on the first rank: it could not be written; nothing of it is left, an older one of that name is still there.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    parts = [*_weights(partial, transformer, weights)]
    for name, beside in ((EMA, average), (OLD, old), (BEHAVIOUR, behaviour)):
        parts += [] if beside is None else _weights(partial / name, transformer, beside)
    parts.append(file_part(partial / OPTIMIZER, optimizer))
    if not first_rank():
        write_parts(parts)
        return
    shutil.rmtree(partial, ignore_errors=True)
    try:
        write_parts(parts)
        save_file(rng_state(), partial / RNG)
        write_state(partial, kind=_kind(transformer), run=run)
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
    if kind_of(folder) == "full" and has_lora(transformer):
        raise UserError(
            f"{folder} holds full weights, this run trains a LoRA adapter; set trainer.lora_rank=0, or resume from another"
        )
    load_weights(folder, transformer)
    average, old, behaviour = (_read_beside(folder / name, experts(transformer)) for name in (EMA, OLD, BEHAVIOUR))
    optimizer = load_file(folder / OPTIMIZER)
    return Saved(run=read_state(folder), average=average, old=old, behaviour=behaviour, optimizer=optimizer)


def _read_beside(folder: Path, networks: Mapping[str, nn.Module]) -> dict[str, torch.Tensor] | None:
    """Another set of the trained parameters, by name; None: there is none."""
    if not folder.is_dir():
        return None
    lora = (folder / LORA).is_dir()
    parts = {name: read_lora(folder / _lora_folder(name)) if lora else _read_full(folder / name) for name in networks}
    return {_prefix(networks, name) + key: tensor for name, tensors in parts.items() for key, tensor in tensors.items()}


def load_weights(folder: Path, transformer: nn.Module) -> None:
    """Loads weights alone, in place: of a checkpoint, or of the `ema` folder in it; attaches an adapter where there is none.

    Raises:
        UserError: weights that do not fit the transformer.
    """
    for name, network in experts(transformer).items():
        if (folder / LORA).is_dir():
            load_lora(network, folder / _lora_folder(name))
            continue
        tensors = _read_full(folder / name)
        check_fit(folder / name, tensors, network.state_dict())
        to_masters(network)
        network.load_state_dict(tensors)


def to_masters(policy: nn.Module) -> None:
    """Makes fp32 master weights of parameters that the base has in another dtype; one at a time, in place."""
    for parameter in policy.parameters():
        parameter.data = parameter.data.float()


def load_generators(folder: Path) -> None:
    """Sets this process's generators to what they were."""
    restore_rng(load_file(folder / RNG))


def _kind(transformer: nn.Module) -> str:
    return "lora" if has_lora(transformer) else "full"


def _weights(folder: Path, policy: nn.Module, weights: Mapping[str, Pending]) -> Iterator[Part]:
    networks: dict[str, Any] = dict(experts(policy))
    for name, network in networks.items():
        prefix = _prefix(networks, name)
        own = {key.removeprefix(prefix): one for key, one in weights.items() if key.startswith(prefix)}
        yield from _lora(folder / _lora_folder(name), network, own) if has_lora(network) else _full(folder / name, network, own)


def _lora(folder: Path, network: Any, weights: Mapping[str, Pending]) -> Iterator[Part]:
    def write(made: Iterator[torch.Tensor]) -> None:
        save_lora(network, folder, {name: tensor.cpu() for name, tensor in zip(weights, made, strict=True)})

    yield Part(list(weights.values()), write)


def save_transformer(folder: Path, network: Any, weights: Mapping[str, torch.Tensor]) -> None:
    """What `from_pretrained` of the network's class in diffusers reads; the network is asked for its configuration alone."""
    write_parts(_full(folder, network, pending(weights)))


def _full(folder: Path, network: Any, weights: Mapping[str, Pending]) -> Iterator[Part]:
    like = {name: one.like() for name, one in weights.items()}
    split = split_torch_state_dict_into_shards(like, filename_pattern=WEIGHTS, max_shard_size=FILE_SIZE)

    def describe(_: Iterator[torch.Tensor]) -> None:
        network.save_config(folder)
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        config.pop("_name_or_path", None)  # where this machine had the base model
        (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        if split.is_sharded:
            index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
            (folder / INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")

    yield Part([], describe)
    for filename, names in split.filename_to_tensors.items():
        yield file_part(folder / filename, {name: weights[name] for name in names}, {"format": "pt"})


def _prefix(networks: Mapping[str, nn.Module], name: str) -> str:
    """Of the names of an expert's parameters in the policy."""
    return "" if len(networks) == 1 else f"{name}."


def _lora_folder(expert: str) -> str:
    return LORA + expert.removeprefix("transformer")


def _read_full(folder: Path) -> dict[str, torch.Tensor]:
    files = sorted(folder.glob("*.safetensors"))
    return {name: tensor for path in files for name, tensor in load_file(path).items()}


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
