"""What the parity probe must know of Qwen-Image's two transformers: how one's names map to the other's, and stock RoPE."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from diffusers.models.transformers import transformer_qwenimage

from omni_rollout.types import InputImage

MEANING = {  # input of the transformer -> what it says when the two sides give it another one
    "timestep": "the timestep is cast or scaled differently, or belongs to another step",
    "hidden_states": "the latents that the transformer saw are not those of the record",
    "image_latents": "the latents of the input images are another's, or in another order",
    "encoder_hidden_states": "the text is not the same width, or not the same text",
    "encoder_hidden_states_mask": "one side has another mask than the other, or none",
    "img_shapes": "the image grid differs",
}
SMALL: dict[str, Any] = {"height": 64, "width": 64, "num_inference_steps": 6}  # sampling, where the config leaves it to us
TRUE_WIDTH = (24, 128)  # heads, and channels of one, of the published model
TRUE_WIDTH_STEPS = 2  # one of them stochastic
FUSED = {  # the engine's projection -> the trainer's, in the order of its columns
    "attn.to_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "attn.add_kv_proj": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
}
MODULATED = ("img_norm1", "img_norm2", "txt_norm1", "txt_norm2")  # the engine's class normalises and modulates
ROTATED = ("image query", "image key", "text query", "text key")  # the order of RoPE's calls within a block
OUTPUT_PROJECTIONS = (".to_out.0", ".to_add_out")


def pictures(number: int) -> tuple[InputImage, ...]:
    """Of the parity probe's prompt `number`."""
    return ()


def told(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """What the transformer is told, with the latents of input images under a name of their own."""
    return parted(inputs, targets=1)


def parted(inputs: Mapping[str, Any], targets: int) -> dict[str, Any]:
    """`targets`: pictures of the grid that are sampled; those after them are input images."""
    whole, grid = inputs["hidden_states"], inputs["img_shapes"][0]
    sampled = sum(math.prod(picture) for picture in grid[:targets])
    beside = whole[:, sampled:]
    return {**inputs, "hidden_states": whole[:, :sampled], "image_latents": beside if beside.shape[1] else None}


def trainer_outputs(name: str, output: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """One output of a module of the engine, under the names of the trainer's modules that compute the same."""
    for fused, parts in FUSED.items():
        if name.endswith(fused):
            stem = name.removesuffix(fused)
            yield from ((stem + part, chunk) for part, chunk in zip(parts, output.chunk(len(parts), dim=-1), strict=True))
            return
    block, _, leaf = name.rpartition(".")
    if leaf == "layernorm":
        yield block, output
    elif leaf == "to_out":
        yield f"{name}.0", output
    elif leaf not in MODULATED:
        yield name, output


def rope_name(call: int) -> str:
    block, which = divmod(call, len(ROTATED))
    return f"transformer_blocks.{block}.attn RoPE of the {ROTATED[which]}"


def attention_name(call: int) -> str:
    return f"transformer_blocks.{call}.attn scaled_dot_product_attention"


def rope_calls(transformer: torch.nn.Module) -> list[torch.nn.Module]:
    """The engine's RoPE modules, which the trainer's transformer has no counterpart of."""
    return [module for name, module in transformer.named_modules() if name.endswith("attn.rope")]


@contextmanager
def swapped_rope(change: Callable[[Callable[..., torch.Tensor]], Callable[..., torch.Tensor]]) -> Iterator[None]:
    """Replaces the trainer's RoPE by `change(it)`."""
    table: Any = transformer_qwenimage.ROPE_PER_DEVICE
    before = dict(table)
    table.update({device: change(rope) for device, rope in before.items() if device in ("cpu", "cuda")})
    try:
        yield
    finally:
        table.clear()
        table.update(before)


def stock_rope(_: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    rope: Any = partial(transformer_qwenimage.apply_rotary_emb_qwen, use_real=False)  # its annotation says it is a tuple
    return rope
