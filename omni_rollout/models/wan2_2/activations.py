"""Bytes that Wan2.2's passes hold beside its weights: closed formulas, held against what torch holds in tests.

They follow the trainer's own modules (`operators`): weights that are cast to the compute dtype as they are used, norms that
compute in fp32. A pass is of one expert; its video and its text are never one sequence.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from omni_rollout.models.base.sizes import Pass, Transformer
from omni_rollout.types import SamplingSpec


def saved(model: Transformer, run: Pass, *, lora: bool, checkpointing: bool) -> int:
    """What a forward pass keeps for backward."""
    ends = _saved_outside_blocks(model, run, lora=lora)
    video = run.rows * run.image_tokens
    if checkpointing:  # the inputs of every block; text and modulations are one for all
        return ends + model.layers * video * model.width * run.item
    # Up to its first adapters nothing that a LoRA policy computes has a gradient: no norm's input, no weight of q, k and v.
    first = video * (4 * model.width + 8) + 3 * run.item * model.width**2 if lora else 0
    return ends + model.layers * saved_in_block(model, run, lora=lora) - first


def saved_in_block(model: Transformer, run: Pass, *, lora: bool) -> int:
    """What backward needs of one block.

    For each token of the video and channel: q, k, v and attention's result of the first attention, q and result of the second
    (6 numbers in the compute dtype), inputs of the projections and of the MLP (3), what is multiplied by a scale or a gate (4);
    in fp32 the inputs of three layer norms, and input and result of the RMS norms of q, k and q (9). For each text token k, v,
    and both sides of k's norm. With LoRA, frozen layers need no inputs. Then modulations, and weights in another form than the
    master's: cast, or merged with LoRA; the text has no gradient then, so its projections keep no weight.
    """
    video, text = run.rows * run.image_tokens, run.rows * run.text_tokens
    numbers, fp32, of_text, inner = (8, 6, 1, 1) if lora else (13, 9, 2, 2)
    statistics = 4 * (video * (2 * model.heads + 6 + 3) + text)  # of attention and norms
    modulation = run.rows * 8 * model.width * run.item
    attention = 6 if lora else 8 if run.casts else 0
    weights = attention * model.width**2 + (2 * model.width * model.inner_width if run.casts else 0)
    return (
        video * (model.width * (numbers * run.item + fp32 * 4) + inner * model.inner_width * run.item)
        + text * model.width * (2 * run.item + of_text * 4)
        + statistics
        + modulation
        + weights * run.item
    )


def _saved_outside_blocks(model: Transformer, run: Pass, *, lora: bool) -> int:
    """Embeddings before the blocks, norm and projection after them, the step."""
    video, text = run.rows * run.image_tokens, run.rows * run.text_tokens
    kept = video * (4 * model.channels + 4 * model.width) + text * model.width * run.item
    weights = model.width * model.out_channels if run.casts else 0
    if lora:
        return kept + weights * run.item
    kept += video * (model.in_channels + 2 * model.width) * run.item
    kept += text * (model.text_width + 2 * model.width) * run.item
    weights += 8 * model.width**2 if run.casts else 0
    return kept + weights * run.item


def backward_working(model: Transformer, run: Pass, *, lora: bool) -> int:
    """At most what backward makes at a time: gradients within one MLP, and of one of its weights; with LoRA in place of these
    the four fp32 matrices that a weight is merged from."""
    video = run.rows * run.image_tokens * run.item
    return video * (2 * model.width + 2 * model.inner_width) + 4 * model.width * (
        4 * model.width if lora else model.inner_width
    )


def forward_working(model: Transformer, run: Pass) -> int:
    """At most what is alive at a time in a pass without gradients."""
    text = run.rows * run.text_tokens * model.width * 3
    return (run.rows * run.image_tokens * (6 * model.width + 2 * model.inner_width) + text) * run.item


def decode_working(vae: Mapping[str, Any], spec: SamplingSpec, item: int) -> int:
    """Largest set of tensors alive while the VAE decodes: of four frames at a time, with what its convolutions keep of those
    before, and all pixels, which it puts together frame by frame."""
    base, blocks, factors = vae["base_dim"], vae["num_res_blocks"], vae["dim_mult"]
    caches = sum(2 * (blocks + 1) * factor / 4**level for level, factor in enumerate(factors))
    pixels = spec.height * spec.width
    return int(pixels * base * item * (2 * caches + 4 * 12)) + 2 * 3 * spec.extra["frames"] * pixels * item
