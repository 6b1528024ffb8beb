"""LoRA factors, as `policy.lora.save_lora` names them: sent in place of weights, and merged into the engine's checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from omni_rollout.diffusion.exact_ops import merged_weight
from omni_rollout.errors import UserError
from omni_rollout.models.base.network import folder_of
from omni_rollout.trajectories.digest import buckets, combined_digest, tensor_digests

FACTORS = (".lora_A.weight", ".lora_B.weight")
METADATA = "lora_adapter_metadata"  # in a file's header; rank and alpha are in it
Layout = Mapping[str, tuple[str, list[int]]]  # name -> dtype and shape


class AdapterError(UserError):
    """Factors that do not fit this model; `at`: the first of them."""

    def __init__(self, message: str, at: str | None = None) -> None:
        super().__init__(message)
        self.at = at


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """What all of a policy's experts are merged with, by the same rank and alpha."""

    factors: Mapping[str, torch.Tensor]  # fp32, on the CPU
    rank: int
    alpha: int

    @property
    def scale(self) -> float:
        """What the product B A is multiplied by."""
        return self.alpha / self.rank

    def header(self) -> dict[str, str]:
        """Of a file, for `scales_of`."""
        experts = sorted({name.partition(".")[0] for name in self.factors})
        of_each = {"r": self.rank, "lora_alpha": self.alpha}
        return {METADATA: json.dumps({f"{expert}.{key}": of_each[key] for expert in experts for key in of_each})}


def write(path: str, named: Iterable[tuple[str, torch.Tensor]], adapter: Adapter | None) -> str:
    """Writes what a server is to be sent: all weights, or what they were merged from; returns the digest of all weights."""
    if adapter is None:
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in named}
        save_file(tensors, path)
        return combined_digest(tensor_digests(tensors.items()))
    save_file({name: tensor.contiguous() for name, tensor in adapter.factors.items()}, path, metadata=adapter.header())
    digests: dict[str, str] = {}
    for bucket in buckets(named):
        digests |= tensor_digests(bucket)
    return combined_digest(digests)


def is_adapter(names: set[str]) -> bool:
    return bool(names) and all(name.endswith(FACTORS) for name in names)


def merged(
    factors: Mapping[str, torch.Tensor],
    scales: Mapping[str, float],
    model: str,
    layout: Layout,
    frozen: Mapping[str, torch.Tensor] | None = None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """All weights of the transformer, by the names of `layout`, one after another; merged where the factors are.

    To be called with as many threads as the trainer has: others may compute other bits.

    Args:
        scales: alpha / rank of each of the policy's experts, folders of `model`; their names stand before those of the factors.
        model: a checkpoint in diffusers layout, or a name on the hub.
        frozen: gives the weights that no factor changes; None: the checkpoint does.

    Raises:
        AdapterError: a factor without the other, or of a layer that is not there, or other shapes than its layer has.
    """
    left = set(factors)
    for expert, scale in scales.items():
        prefix = "" if len(scales) == 1 else f"{expert}."
        for name, read in _checkpoint(folder_of(model, expert)):
            layer = f"{expert}.{name.removesuffix('.weight')}"
            names = [layer + end for end in FACTORS]
            left -= set(names)
            found = [factors[one] for one in names if one in factors]
            dtype, shape = layout[prefix + name]
            if not found:
                yield prefix + name, frozen[prefix + name] if frozen is not None else read().to(getattr(torch, dtype))
                continue
            if len(found) == 1:
                raise AdapterError(f"{layer}: one factor without the other", layer)
            a, b = found
            if a.ndim != 2 or b.ndim != 2 or [b.shape[0], a.shape[1]] != shape or a.shape[0] != b.shape[1]:
                raise AdapterError(f"{layer}: factors {list(a.shape)} and {list(b.shape)} of a weight {shape}", layer)
            yield prefix + name, merged_weight(read().to(a.device), a, b, scale, getattr(torch, dtype))
    if left:
        raise AdapterError(f"{min(left)}: the transformer has no such layer", min(left)[:80])


def scales_of(header: Mapping[str, str], experts: tuple[str, ...]) -> dict[str, float]:
    """alpha / rank of each expert, as a file of `save_lora` says them.

    Raises:
        AdapterError: it does not.
    """
    try:
        values = json.loads(header[METADATA])
        return {expert: values[f"{expert}.lora_alpha"] / values[f"{expert}.r"] for expert in experts}
    except (KeyError, ValueError, TypeError, ZeroDivisionError):
        text = f"{METADATA}: expected r and lora_alpha of {', '.join(experts)} in the header, as save_lora writes them"
        raise AdapterError(text, METADATA) from None


def _checkpoint(folder: Path) -> Iterator[tuple[str, Callable[[], torch.Tensor]]]:
    """Names, and what reads each."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise AdapterError(f"{folder} holds no weights: LoRA factors need the checkpoint that they were trained on")
    for path in files:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118, it is no mapping
                yield name, lambda name=name, file=file: file.get_tensor(name)
