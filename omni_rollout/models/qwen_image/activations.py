"""Bytes that Qwen-Image's passes hold beside its weights: closed formulas, held against what torch holds in tests.

They follow the trainer's own modules (`exact_ops`): weights that are cast to the compute dtype as they are used, norms that
round in fp32. Batches are of one size; attention's score matrix is never whole (torch's fused kernels; on some CPUs products, a
head at a time, which keep less for backward: `diffusion/attention_products.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from omni_rollout.models.base.sizes import Pass, Transformer
from omni_rollout.types import SamplingSpec

CONDITIONING_ROWS = 16  # diffusion/products.py, without importing torch for it


def saved(model: Transformer, run: Pass, *, lora: bool, checkpointing: bool) -> int:
    """What a forward pass keeps for backward."""
    ends = _saved_outside_blocks(model, run, lora=lora)
    if checkpointing:  # the inputs of every block
        return ends + model.layers * run.tokens * model.width * run.item
    # Up to its first adapters nothing that a LoRA policy computes has a gradient: no norm's input, no weight of q, k and v.
    first = run.tokens * model.width * 4 + 6 * run.item * model.width**2 if lora else 0
    return ends + model.layers * saved_in_block(model, run, lora=lora) - first


def saved_in_block(model: Transformer, run: Pass, *, lora: bool) -> int:
    """What backward needs of one block.

    For each token and channel: q, k, v and attention's result (4 numbers in the compute dtype), inputs of the projections and
    of the MLP's layers (3 + 4 + 4), what is multiplied by a scale or a gate (4); in fp32 the inputs of both layer norms, and
    input and result of the RMS norms of q and k (6). With LoRA, frozen layers need no inputs: 10 and 4 are left. Then the
    modulations, and weights in another form than the master's: cast, or merged with LoRA.
    """
    numbers, fp32 = (10, 4) if lora else (19, 6)
    statistics = 4 * (3 * model.heads + 4)  # of norms and attention, per token
    modulation = max(run.rows, CONDITIONING_ROWS) * model.width * run.item * (12 if lora else 14)
    # Squares of the width: merged weights; cast ones, of which with LoRA those of the modulation have no gradient.
    squares = (8 if lora else 0) + (0 if not run.casts else 16 if lora else 36)
    weights = squares * run.item * model.width**2
    return run.tokens * (model.width * (numbers * run.item + fp32 * 4) + statistics) + modulation + weights


def _saved_outside_blocks(model: Transformer, run: Pass, *, lora: bool) -> int:
    """Embeddings before the blocks, norm and projection after them."""
    image = run.rows * run.image_tokens * (4 * model.channels + model.width * run.item)
    weights = model.width * model.out_channels * run.item if run.casts else 0
    if lora:
        return image + weights
    image += run.rows * run.image_tokens * (model.channels + 2 * model.width) * run.item
    text = run.rows * run.text_tokens * model.text_width * (4 + run.item)
    weights += model.width * (3 * model.width + model.text_width) * run.item if run.casts else 0
    return image + text + weights


def backward_working(model: Transformer, run: Pass, *, lora: bool) -> int:
    """At most what backward makes at a time: gradients within one image MLP, and of one of its weights; with LoRA in place of
    these the four fp32 matrices that a weight is merged from."""
    image = run.rows * run.image_tokens * model.width * run.item
    return 10 * image + 4 * 4 * model.width**2


def forward_working(model: Transformer, run: Pass) -> int:
    """At most what is alive at a time in a pass without gradients."""
    return 14 * run.tokens * model.width * run.item


def decode_working(vae: Mapping[str, Any], spec: SamplingSpec, item: int) -> int:
    """Largest set of tensors alive while the VAE decodes one image: its convolutions' caches and one level's tensors."""
    base, blocks, factors = vae["base_dim"], vae["num_res_blocks"], vae["dim_mult"]
    caches = sum(2 * (blocks + 1) * factor / 4**level for level, factor in enumerate(factors))
    return int(spec.height * spec.width * base * item * (caches + 12))
