"""What a family's `sizes.py` and `activations.py` tell the plan: no torch, no weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from omni_rollout.errors import UserError
from omni_rollout.types import Layout

DECODE_ROWS, DECODE_PIXELS = 4, 2**17  # of a batch, at most: more gain nothing, and of 192 x 192 or more two gain as much
SMALL_PIXELS = 2**18  # of an image that one thread decodes, at most


def is_small(layout: Layout) -> bool:
    """Whether one thread decodes it: by the size alone, likewise."""
    return prod(layout.media[:-1]) <= SMALL_PIXELS


def decode_rows(layout: Layout) -> int:
    """How many media of this size the VAE is given at a time: by the size alone, so that bits depend on nothing else."""
    return max(1, min(DECODE_ROWS, DECODE_PIXELS // prod(layout.media[:-1])))


@dataclass(frozen=True, kw_only=True)
class Transformer:
    layers: int
    width: int  # heads * head_dim
    heads: int
    text_width: int  # of the prompt embeddings
    channels: int  # of a packed latent
    out_channels: int  # of its velocity
    inner_width: int = 0  # of the MLP, where it is no fixed multiple of the width
    in_channels: int = 0  # of a packed latent with the condition beside it, where there is one
    parameters: int
    block_parameters: int

    @property
    def adapted_parameters(self) -> int:
        """Weights that LoRA is added to."""
        return self.layers * 8 * self.width**2

    def lora_parameters(self, rank: int) -> int:
        """Of the two factors beside each of the eight attention projections of a block; all are width x width."""
        return self.layers * 8 * 2 * rank * self.width


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Of one checkpoint."""

    transformer: Transformer  # of several experts, one of them
    text_encoder_parameters: int  # without the vision tower
    vision_parameters: int
    vision_kept: bool = False  # by the engine, which drops the tower where nothing is shown to it
    vae_parameters: int
    vae_config: Mapping[str, Any]
    transformer_item: int  # bytes of a stored weight
    text_encoder_item: int | None  # bytes of a stored weight, where the engine keeps that dtype; None: it takes its own
    vae_item: int | None
    experts: int = 1

    @property
    def encoder_parameters(self) -> int:
        """Of the text encoder as the engine holds it."""
        return self.text_encoder_parameters + (self.vision_parameters if self.vision_kept else 0)


def checkpoint_sizes(
    path: str,
    published: Mapping[str, Mapping[str, Any]],
    parts: Iterable[str],
    tell: Callable[[Mapping[str, Mapping[str, Any]]], Sizes],
) -> Sizes:
    """What `tell` makes of the config.json files of a folder in diffusers layout, or of a `published` checkpoint by its hub id.

    Raises:
        UserError: no such folder or published checkpoint, a config.json that is missing or lacks a key.
    """
    folder = Path(path)
    if not folder.is_dir() and path not in published:
        raise UserError(
            f"model.path={path}: no such folder, and its sizes are not shipped; give a folder, or {', '.join(published)}"
        )
    try:
        return tell({part: read_config(folder / part) for part in parts} if folder.is_dir() else published[path])
    except KeyError as error:
        raise UserError(f"model.path={path}: a config.json has no {error.args[0]}, so sizes cannot be told") from error


def read_config(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read: {error}; expected a checkpoint in diffusers layout") from error


ITEM_BYTES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2}  # as safetensors names them


def stored_item(folder: Path, published: int) -> int:
    """Bytes of a weight as the first file stores it, from the file's header; of a folder without weights: as `published`."""
    file = min(folder.glob("*.safetensors"), default=None)
    return published if file is None else next(ITEM_BYTES[entry["dtype"]] for entry in _stored(file))


def stored_bytes(folder: Path) -> int | None:
    """Of all tensors in a folder's safetensors, from their headers; None: it has none."""
    files = list(folder.glob("*.safetensors"))
    return sum(end - start for file in files for start, end in (one["data_offsets"] for one in _stored(file))) or None


def _stored(file: Path) -> list[Mapping[str, Any]]:
    with file.open("rb") as stream:
        header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    return [entry for name, entry in header.items() if name != "__metadata__"]


@dataclass(frozen=True, kw_only=True)
class Pass:
    """One forward pass, of one guidance branch or of both."""

    rows: int
    image_tokens: int
    text_tokens: int
    item: int  # bytes of the compute dtype
    master: int = 4  # bytes of the dtype that the trainer holds the weights in; with LoRA, the frozen ones

    @property
    def casts(self) -> bool:
        """Whether weights are used in another dtype than they are held in."""
        return self.item != self.master

    @property
    def tokens(self) -> int:
        return self.rows * (self.image_tokens + self.text_tokens)
