"""How many parameters Wan2.2 has, by closed formulas over its checkpoint's `config.json` files: no torch, no weights."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from omni_rollout.models.base.sizes import Sizes, Transformer, checkpoint_sizes, stored_item
from omni_rollout.models.qwen_image.sizes import vae_parameters
from omni_rollout.models.wan2_2.spec import EXPERTS, LATENT_CHANNELS

PATCH = 4  # latent positions that make a token

_A14B: dict[str, dict[str, Any]] = {
    "transformer": {
        "num_layers": 40,
        "num_attention_heads": 40,
        "attention_head_dim": 128,
        "ffn_dim": 13824,
        "freq_dim": 256,
        "text_dim": 4096,
        "in_channels": 16,
        "out_channels": 16,
    },
    "text_encoder": {"vocab_size": 256384, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64},
    "vae": {
        "base_dim": 96,
        "z_dim": 16,
        "dim_mult": [1, 2, 4, 4],
        "num_res_blocks": 2,
        "temperal_downsample": [False, True, True],
    },
}
# What the published checkpoints' config.json files say, where they enter the formulas.
PUBLISHED: dict[str, dict[str, dict[str, Any]]] = {
    "Wan-AI/Wan2.2-T2V-A14B-Diffusers": _A14B,
    "Wan-AI/Wan2.2-I2V-A14B-Diffusers": {**_A14B, "transformer": {**_A14B["transformer"], "in_channels": 36}},
}


def read_sizes(path: str) -> Sizes:
    """See `checkpoint_sizes`."""
    stored = stored_item(Path(path) / "transformer", 4)  # of the published files not looked up: fp32 is the most it can be
    return checkpoint_sizes(path, PUBLISHED, _A14B, partial(_sizes, stored))


def _sizes(stored: int, configs: Mapping[str, Mapping[str, Any]]) -> Sizes:
    return Sizes(
        transformer_item=stored,
        transformer=transformer(configs["transformer"]),
        experts=len(EXPERTS),
        text_encoder_parameters=text_parameters(configs["text_encoder"]),
        vision_parameters=0,
        vae_parameters=vae_parameters({"input_channels": configs["vae"].get("in_channels", 3), **configs["vae"]}),
        vae_config=configs["vae"],
        text_encoder_item=None,
        vae_item=None,
    )


def transformer(config: Mapping[str, Any]) -> Transformer:
    """Of one expert; `inner_width` of its MLP."""
    heads, layers, inner = config["num_attention_heads"], config["num_layers"], config["ffn_dim"]
    width, out = heads * config["attention_head_dim"], PATCH * config["out_channels"]
    # Two attentions, each with norms of query and key; their norm between; the MLP; the table of modulations.
    block = 8 * _linear(width, width) + 4 * width + 2 * width + _linear(width, inner) + _linear(inner, width) + 6 * width
    time = _linear(config["freq_dim"], width) + _linear(width, width) + _linear(width, 6 * width)
    text = _linear(config["text_dim"], width) + _linear(width, width)
    ends = time + text + _linear(PATCH * config["in_channels"], width) + _linear(width, out) + 2 * width
    return Transformer(
        layers=layers,
        width=width,
        heads=heads,
        inner_width=inner,
        text_width=config["text_dim"],
        channels=PATCH * LATENT_CHANNELS,
        in_channels=PATCH * config["in_channels"],
        out_channels=out,
        parameters=layers * block + ends,
        block_parameters=block,
    )


def text_parameters(config: Mapping[str, Any]) -> int:
    """UMT5's encoder: a gated MLP, and in every layer a table of relative positions."""
    width, inner, heads = config["d_model"], config["d_ff"], config["num_heads"]
    positions = config.get("relative_attention_num_buckets", 32) * heads
    layer = 4 * width * heads * config["d_kv"] + positions + 3 * width * inner + 2 * width
    return config["vocab_size"] * width + config["num_layers"] * layer + width


def _linear(inputs: int, outputs: int) -> int:
    return inputs * outputs + outputs
