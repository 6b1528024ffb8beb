"""`omni-rollout export`: a checkpoint as what diffusers loads, with a model card.

--to pipeline      a whole checkpoint in diffusers layout: the base model's parts, and the trained transformer in it
--to transformer   transformer/ (and transformer_2/) alone; a LoRA is merged into its base, as the engine sampled with it
--to lora          the adapter, for load_lora_weights in diffusers, and for ComfyUI; of two experts: lora/ and lora_2/
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from huggingface_hub import snapshot_download

from omni_rollout.config import TrainConfig
from omni_rollout.diffusion.exact_ops import effective_weights
from omni_rollout.launch.model_files import INDEX
from omni_rollout.models.base.policy import experts
from omni_rollout.policy.checkpoint import save_transformer
from omni_rollout.policy.lora import write_unscaled
from omni_rollout.policy.state import LORA, verify
from omni_rollout.run.model_card import write_card
from omni_rollout.run.restore import restored_policy
from omni_rollout.run.source import Source


def export(config: TrainConfig, source: Source, to: str, out: Path) -> None:
    """Writes the checkpoint, in `config.model.dtype`, and its card into `out`.

    Raises:
        UserError: a file that is not what was saved, or weights that do not fit the base model.
    """
    out.mkdir(parents=True, exist_ok=True)
    if to == "lora":
        _lora(config, source, out)
    else:
        _transformers(config, source, out)
    if to == "pipeline":
        _other_parts(config.model.path, out)
    write_card(config, source, to, out)


def _lora(config: TrainConfig, source: Source, out: Path) -> None:
    verify(source.folder)
    adapters = sorted(path for path in source.weights_folder.glob(f"{LORA}*") if path.is_dir())
    for adapter in adapters:
        target = out if len(adapters) == 1 else out / adapter.name
        write_unscaled(adapter, target, getattr(torch, config.model.dtype.value))


def _transformers(config: TrainConfig, source: Source, out: Path) -> None:
    policy = restored_policy(config, source)
    weights = dict(effective_weights(policy, getattr(torch, config.model.dtype.value)))
    networks = experts(policy)
    for name, network in networks.items():
        prefix = "" if len(networks) == 1 else f"{name}."
        own = {key.removeprefix(prefix): tensor.cpu() for key, tensor in weights.items() if key.startswith(prefix)}
        save_transformer(out / name, network, own)


def _other_parts(model: str, out: Path) -> None:
    """Copies what the base model's index names and training has not touched."""
    base = Path(model) if Path(model).is_dir() else Path(snapshot_download(model))
    listed = json.loads((base / INDEX).read_text(encoding="utf-8"))
    shutil.copyfile(base / INDEX, out / INDEX)
    for name, part in listed.items():
        if isinstance(part, list) and (base / name).is_dir() and not (out / name).exists():
            shutil.copytree(base / name, out / name)
