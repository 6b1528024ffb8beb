"""What the parity probe must know of Wan2.2's two kinds of transformer: how one's names map to the other's, and RoPE."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch

from omni_rollout.models.base.causes import swapped
from omni_rollout.models.wan2_2 import operators
from omni_rollout.models.wan2_2.spec import LATENT_CHANNELS
from omni_rollout.types import InputImage

MEANING = {  # input of the transformer -> what it says when the two sides give it another one
    "timestep": "the timestep is cast or scaled differently, or belongs to another step",
    "hidden_states": "the latents that the transformer saw are not those of the record",
    "condition": "what stands beside the latents, a mask and the input image, is not what the record holds",
    "encoder_hidden_states": "the text is not the same width, or not the same text",
}
# Sampling, where the config leaves it to us: a grid of three different sides, and steps of both experts.
SMALL: dict[str, Any] = {
    "height": 32,
    "width": 64,
    "num_inference_steps": 6,
    "extra": {"frames": 9, "flow_shift": 3.0},
}
TRUE_WIDTH = (40, 128)  # heads, and channels of one, of the published model
TRUE_WIDTH_STEPS = 3  # two of them stochastic, one of each expert
FUSED = {"attn1.to_qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v")}  # the engine's -> the trainer's, by columns
RENAMED = {"ffn.net_0.proj": "ffn.net.0.proj", "ffn.net_0": "ffn.net.0", "ffn.net_2": "ffn.net.2", "to_out": "to_out.0"}
MODULATED = ("norm1", "norm3", "norm_out")  # the engine's class normalises and modulates
ATTENTIONS = ("attn1", "attn2")  # of a block: to itself, to the text
ROTATED = ("query", "key")


def pictures(number: int) -> tuple[InputImage, ...]:
    """Of the parity probe's prompt `number`."""
    return ()


def told(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """What the transformer is told, with what stands beside the latents under a name of its own."""
    whole = inputs["hidden_states"]
    beside = whole[:, LATENT_CHANNELS:]
    return {**inputs, "hidden_states": whole[:, :LATENT_CHANNELS], "condition": beside if beside.shape[1] else None}


def trainer_outputs(name: str, output: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """One output of a module of the engine, under the names of the trainer's modules that compute the same."""
    for fused, parts in FUSED.items():
        if name.endswith(fused):
            stem = name.removesuffix(fused)
            yield from ((stem + part, chunk) for part, chunk in zip(parts, output.chunk(len(parts), dim=-1), strict=True))
            return
    for own, other in RENAMED.items():
        if name.endswith(f".{own}"):
            yield name.removesuffix(own) + other, output
            return
    parent, _, leaf = name.rpartition(".")
    if leaf == "layernorm":
        yield parent, output
    elif leaf not in MODULATED:
        yield name, output


def rope_name(call: int) -> str:
    block, which = divmod(call, len(ROTATED))
    return f"blocks.{block}.attn1 RoPE of the {ROTATED[which]}"


def attention_name(call: int) -> str:
    block, which = divmod(call, len(ATTENTIONS))
    return f"blocks.{block}.{ATTENTIONS[which]} scaled_dot_product_attention"


def rope_calls(transformer: torch.nn.Module) -> list[torch.nn.Module]:
    """The engine's RoPE modules, which the trainer's transformer has no counterpart of."""
    return [module for name, module in transformer.named_modules() if name.endswith("attn1.rotary_embedding")]


def swapped_rope(change: Callable[[Callable[..., torch.Tensor]], Callable[..., torch.Tensor]]) -> AbstractContextManager[None]:
    """Replaces the trainer's RoPE by `change(it)`."""
    return swapped(operators, "rotate", change(operators.rotate))
