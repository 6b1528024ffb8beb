"""Which checkpoints of diffusers' Wan classes are this family's: told from their JSON, before a weight is read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from omni_rollout.errors import UserError


def read_index(path: str, in_channels: int) -> dict[str, Any]:
    """model_index.json of a checkpoint, in a folder or on the hub.

    Raises:
        UserError: what `misfits` says.
    """
    from diffusers import WanPipeline, WanTransformer3DModel  # `launch` asks `misfits` without paying for it

    index: Any = WanPipeline.load_config(path)
    transformer: Any = WanTransformer3DModel.load_config(path, subfolder="transformer")
    for problem in misfits(index, transformer, in_channels):
        raise UserError(f"model.path={path}: {problem}")
    return dict(index)


def misfits(index: Mapping[str, Any], transformer: Mapping[str, Any], in_channels: int) -> Iterator[str]:
    """What keeps a checkpoint from being sampled, a line for each.

    Args:
        index: model_index.json.
        transformer: config.json of either expert.
        in_channels: that the family's transformers read.
    """
    if index.get("expand_timesteps"):
        yield "model_index.json says expand_timesteps, so it is TI2V-5B, which has a time for every token: not supported yet"
    if transformer.get("image_dim") is not None:
        yield f"its transformer has image_dim={transformer['image_dim']}, so it is Wan2.1's image to video: expected Wan2.2's"
    found, head = transformer.get("in_channels", in_channels), transformer.get("attention_head_dim", 128)
    if found != in_channels:
        yield f"its transformer reads {found} channels, this family's {in_channels}"
    if head // 3 != 2 * (head // 6):
        near = [size for size in range(max(head - 8, 12), head + 8) if size // 3 == 2 * (size // 6) and size % 2 == 0]
        yield (
            f"its transformer has attention_head_dim={head}, which the engine and diffusers share out differently among time, "
            f"height and width: expected {' or '.join(map(str, near))}"
        )


def boundary_misfit(index: Mapping[str, Any], boundary_ratio: float) -> str | None:
    """Why experts trained for one boundary cannot be sampled with another; an index may say none."""
    found = index.get("boundary_ratio")
    if found is None or float(found) == boundary_ratio:
        return None
    return (
        f"model_index.json says boundary_ratio={found}, the request {boundary_ratio}: its experts were trained for their own "
        f"side of it; set sampling.extra.boundary_ratio={found}"
    )
