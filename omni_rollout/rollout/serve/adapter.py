"""LoRA factors, as `policy.lora.save_lora` writes them, merged into the checkpoint that the server was started with."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import safe_open

from omni_rollout.diffusion.exact_ops import merged_weight
from omni_rollout.diffusion.machine import pin_thread
from omni_rollout.rollout.serve.errors import BadRequest

FACTORS = (".lora_A.weight", ".lora_B.weight")
METADATA = "lora_adapter_metadata"  # in the header; rank and alpha are in it
Layout = Mapping[str, tuple[str, list[int]]]


def is_adapter(names: set[str]) -> bool:
    return bool(names) and all(name.endswith(FACTORS) for name in names)


def merged(
    factors: Mapping[str, torch.Tensor],
    header: Mapping[str, str],
    model: str,
    experts: tuple[str, ...],
    layout: Layout,
    threads: int,
) -> dict[str, torch.Tensor]:
    """All weights of the transformer, by the names of `layout`.

    Args:
        experts: folders of `model`; each one's name stands before those of its factors.
        threads: that products are computed with, as the trainer's are.

    Raises:
        BadRequest: a factor without the other, or of a layer that is not there, or other shapes than its layer has.
    """
    pin_thread(threads)
    scales = _scales(header, experts)
    left = set(factors)
    weights: dict[str, torch.Tensor] = {}
    for expert in experts:
        prefix = "" if len(experts) == 1 else f"{expert}."
        for name, base in _checkpoint(Path(model) / expert):
            dtype, shape = layout[prefix + name]
            layer = f"{expert}.{name.removesuffix('.weight')}"
            names = [layer + end for end in FACTORS]
            left -= set(names)
            found = [factors[one] for one in names if one in factors]
            if len(found) == 1:
                raise BadRequest(f"{layer}: one factor without the other", layer)
            if found:
                a, b = found
                if a.ndim != 2 or b.ndim != 2 or [b.shape[0], a.shape[1]] != shape or a.shape[0] != b.shape[1]:
                    raise BadRequest(f"{layer}: factors {list(a.shape)} and {list(b.shape)} of a weight {shape}", layer)
                weights[prefix + name] = merged_weight(base, a, b, scales[expert], getattr(torch, dtype))
            else:
                weights[prefix + name] = base.to(getattr(torch, dtype))
    if left:
        raise BadRequest(f"{min(left)}: the transformer has no such layer", min(left)[:80])
    return weights


def _scales(header: Mapping[str, str], experts: tuple[str, ...]) -> dict[str, float]:
    try:
        values = json.loads(header[METADATA])
        return {expert: values[f"{expert}.lora_alpha"] / values[f"{expert}.r"] for expert in experts}
    except (KeyError, ValueError, TypeError, ZeroDivisionError):
        text = f"{METADATA}: expected r and lora_alpha of {', '.join(experts)} in the header, as save_lora writes them"
        raise BadRequest(text, METADATA) from None


def _checkpoint(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise BadRequest(
            "body: LoRA factors need a server whose model.path is a folder with the checkpoint they were trained on"
        )
    for path in files:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118, it is no mapping
                yield name, file.get_tensor(name)
