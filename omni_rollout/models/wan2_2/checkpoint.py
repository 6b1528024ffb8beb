"""Which checkpoints of diffusers' Wan classes are this family's: told from their JSON, before a weight is read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from omni_rollout.errors import UserError


def read_index(path: str, in_channels: int | None = None) -> dict[str, Any]:
    """model_index.json of a checkpoint, in a folder or on the hub.

    Args:
        in_channels: that the family's transformers read; None: of any of the family's.

    Raises:
        UserError: what `architecture_misfits` says.
    """
    from diffusers import WanPipeline, WanTransformer3DModel  # `launch` asks `misfits` without paying for it

    index: Any = WanPipeline.load_config(path)
    transformer: Any = WanTransformer3DModel.load_config(path, subfolder="transformer")
    for problem in architecture_misfits(index, transformer, in_channels):
        raise UserError(f"model.path={path}: {problem}")
    return dict(index)


def misfits(
    index: Mapping[str, Any], transformer: Mapping[str, Any], extra: Mapping[str, Any], *, in_channels: int
) -> Iterator[str]:
    """What keeps a checkpoint from being sampled with these parameters, a line for each; see `Rules.misfits`."""
    yield from architecture_misfits(index, transformer, in_channels)
    problem = boundary_misfit(index, extra["boundary_ratio"])
    if problem is not None:
        yield problem


def architecture_misfits(index: Mapping[str, Any], transformer: Mapping[str, Any], in_channels: int | None) -> Iterator[str]:
    if index.get("expand_timesteps"):
        yield "model_index.json says expand_timesteps, so it is TI2V-5B, which has a time for every token: not supported yet"
    if transformer.get("image_dim") is not None:
        yield f"its transformer has image_dim={transformer['image_dim']}, so it is Wan2.1's image to video: expected Wan2.2's"
    found, head = transformer.get("in_channels"), transformer.get("attention_head_dim", 128)
    if None not in (found, in_channels) and found != in_channels:
        yield f"its transformer reads {found} channels, this family's {in_channels}"
    if not shared_alike(head):
        near = [size for size in range(max(head - 8, 12), head + 9, 2) if shared_alike(size)]
        yield (
            f"its transformer has attention_head_dim={head}, which the engine and diffusers share out differently among time, "
            f"height and width: expected {' or '.join(map(str, near))}"
        )


def shared_alike(head_dim: int) -> bool:
    """The engine makes RoPE's tables for two sixths of a head's channels, and cuts them at a third."""
    return head_dim // 3 == 2 * (head_dim // 6)


def boundary_misfit(index: Mapping[str, Any], boundary_ratio: float) -> str | None:
    """Why experts trained for one boundary cannot be sampled with another; an index may say none."""
    found = index.get("boundary_ratio")
    if found is None or float(found) == boundary_ratio:
        return None
    return (
        f"model_index.json says boundary_ratio={found}, the request {boundary_ratio}: its experts were trained for their own "
        f"side of it; set sampling.extra.boundary_ratio={found}"
    )
