"""Untrained checkpoints of any family and size in diffusers layout, for tests, benchmarks and `omni-rollout parity`.

A file per family; a family without one has its parent's.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

from omni_rollout.errors import UserError
from omni_rollout.models import family_module
from omni_rollout.nano.components import check_seed


def build_random(
    out: Path,
    *,
    family: str = "qwen_image",
    layers: int = 2,
    heads: int = 4,
    head_dim: int = 32,
    joint_dim: int = 64,
    seed: int = 0,
) -> Path:
    """Write a complete float32 checkpoint of `family` with random weights to `out` and return `out`.

    Args:
        layers: blocks of each transformer.
        heads: attention heads of each transformer; its width is heads * head_dim.
        head_dim: even, at least 8; a family may ask for more.
        joint_dim: width of the text encoder and of the prompt embeddings, a multiple of 32.
        seed: the same arguments and seed give the same bytes; 0 to 2**63 - 1.

    Raises:
        UserError: a number that is none of these, or a family that is not known.
    """
    for name, number in (("layers", layers), ("heads", heads)):
        if number < 1:
            raise UserError(f"{name}={number}: expected at least 1")
    check_seed(seed)
    build = _builder(family).build
    build(out, layers=layers, heads=heads, head_dim=head_dim, joint_dim=joint_dim, seed=seed)
    return out


def _builder(family: str) -> ModuleType:
    try:
        parent = family_module(family, "spec").PARENT
    except ValueError as error:
        raise UserError(str(error)) from None
    if find_spec(f"{__name__}.{family}") is None and parent is not None:
        return _builder(parent)
    return import_module(f"{__name__}.{family}")
