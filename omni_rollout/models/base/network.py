"""A transformer of diffusers on the trainer's side, read tensor by tensor."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from huggingface_hub import snapshot_download
from safetensors import safe_open

from omni_rollout.errors import UserError, WeightSyncError

Held = Mapping[str, torch.Tensor]  # by checkpoint name: what an engine in this process holds already, and shares

WEIGHTS = "diffusion_pytorch_model.safetensors"  # diffusers' name


def load_network(kind: Any, path: str, folder: str = "transformer", held: Held | None = None) -> Any:
    """The `kind` of diffusers that lies at `path`, every parameter in the dtype that the checkpoint has it in.

    Args:
        path: a checkpoint in diffusers layout, the folder of the transformer itself, or a name on the hub.
        held: a parameter that is in it becomes that tensor, in its dtype, and no copy is made.

    Raises:
        UserError: weights that are not there.
        WeightSyncError: a held tensor that is not, rounded to its dtype, what the checkpoint says.
    """
    own = folder_of(path, folder)
    with init_empty_weights():
        network = kind.from_config(kind.load_config(own))
    network.register_to_config(_name_or_path=path)
    wanted = network.state_dict().keys()
    state = {name: _taken(name, tensor, held or {}) for name, tensor in _tensors(own) if name in wanted}
    if missing := sorted(wanted - state.keys()):
        raise UserError(f"{own} has no {missing[0]} ({len(missing)} missing): expected the weights of a {kind.__name__}")
    network.load_state_dict(state, assign=True)
    return network


def folder_of(path: str, folder: str) -> Path:
    """Where a transformer lies: `path` is a checkpoint in diffusers layout, the transformer's own, or a name on the hub."""
    own = Path(path)
    if (own / "config.json").is_file():
        return own
    return (own if own.is_dir() else Path(snapshot_download(path, allow_patterns=f"{folder}/*"))) / folder


def _taken(name: str, tensor: torch.Tensor, held: Held) -> torch.Tensor:
    if name not in held:
        return tensor.clone()  # the file may be replaced while this runs
    shared = held[name]
    if not torch.equal(tensor.to(shared), shared):
        raise WeightSyncError(f"weight {name}: the engine holds another than the checkpoint, which it was loaded from")
    return shared


def _tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """One at a time, each in a mapping of the file that goes when the tensor does."""
    index = folder / f"{WEIGHTS}.index.json"
    names = sorted(set(json.loads(index.read_text())["weight_map"].values())) if index.is_file() else [WEIGHTS]
    for path in (folder / name for name in names):
        if not path.is_file():
            raise UserError(f"{path} does not exist: expected the weights of a transformer, in safetensors")
        with safe_open(path, framework="pt") as file:
            inside = list(file.keys())
        for name in inside:
            with safe_open(path, framework="pt") as file:
                yield name, file.get_tensor(name)
