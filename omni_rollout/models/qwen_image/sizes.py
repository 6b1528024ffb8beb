"""How many parameters Qwen-Image has, by closed formulas over its checkpoint's `config.json` files: no torch, no weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omni_rollout.models.base.sizes import Sizes, Transformer, checkpoint_sizes, stored_item

PARTS = ("transformer", "text_encoder", "vae")

# What the published checkpoint's config.json files say, where they enter the formulas. Weights in bfloat16.
PUBLISHED: dict[str, dict[str, dict[str, Any]]] = {
    "Qwen/Qwen-Image": {
        "transformer": {
            "num_layers": 60,
            "num_attention_heads": 24,
            "attention_head_dim": 128,
            "joint_attention_dim": 3584,
            "in_channels": 64,
            "out_channels": 16,
            "patch_size": 2,
        },
        "text_encoder": {
            "vocab_size": 152064,
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "tie_word_embeddings": False,
            "vision_config": {
                "depth": 32,
                "hidden_size": 1280,
                "intermediate_size": 3420,
                "in_channels": 3,
                "patch_size": 14,
                "temporal_patch_size": 2,
                "spatial_merge_size": 2,
                "out_hidden_size": 3584,
            },
        },
        "vae": {
            "base_dim": 96,
            "z_dim": 16,
            "dim_mult": [1, 2, 4, 4],
            "num_res_blocks": 2,
            "temperal_downsample": [False, True, True],
            "input_channels": 3,
        },
    }
}


def read_sizes(path: str, published: Mapping[str, Mapping[str, Any]] = PUBLISHED) -> Sizes:
    """See `checkpoint_sizes`."""

    def tell(configs: Mapping[str, Mapping[str, Any]]) -> Sizes:
        text_encoder = configs["text_encoder"]
        return Sizes(
            transformer=transformer(configs["transformer"]),
            text_encoder_parameters=text_parameters(text_encoder),
            vision_parameters=vision_parameters(text_encoder["vision_config"]),
            vae_parameters=vae_parameters(configs["vae"]),
            vae_config=configs["vae"],
            transformer_item=stored_item(Path(path) / "transformer", 2),
            text_encoder_item=stored_item(Path(path) / "text_encoder", 2),
            vae_item=stored_item(Path(path) / "vae", 2),
        )

    return checkpoint_sizes(path, published, PARTS, tell)


def transformer(config: Mapping[str, Any]) -> Transformer:
    heads, head, layers = config["num_attention_heads"], config["attention_head_dim"], config["num_layers"]
    text, channels, patch = config["joint_attention_dim"], config["in_channels"], config["patch_size"] ** 2
    width, out = heads * head, patch * (config["out_channels"] or channels)
    # Modulation 2 x 6 width^2, attention 8, two MLPs of 8 each; biases; four norms over a head.
    block = 36 * width**2 + 30 * width + 4 * head
    time = _linear(256, width) + _linear(width, width) + (2 * width if config.get("use_additional_t_cond") else 0)
    ends = time + text + _linear(channels, width) + _linear(text, width) + _linear(width, 2 * width) + _linear(width, out)
    return Transformer(
        layers=layers,
        width=width,
        heads=heads,
        text_width=text,
        channels=channels,
        out_channels=out,
        parameters=layers * block + ends,
        block_parameters=block,
    )


def text_parameters(config: Mapping[str, Any]) -> int:
    """Qwen2.5-VL's language model with its head; the configuration is flat or below `text_config`."""
    text = config.get("text_config", config)
    width, inner, heads = text["hidden_size"], text["intermediate_size"], text["num_attention_heads"]
    keys = text["num_key_value_heads"] * (width // heads)
    attention = _linear(width, width) + 2 * _linear(width, keys) + width**2
    layer = attention + 3 * width * inner + 2 * width
    embeddings = text["vocab_size"] * width * (1 if config.get("tie_word_embeddings") else 2)
    return embeddings + text["num_hidden_layers"] * layer + width


def vision_parameters(config: Mapping[str, Any]) -> int:
    width, inner, out = config["hidden_size"], config["intermediate_size"], config["out_hidden_size"]
    pixels = config["in_channels"] * config["temporal_patch_size"] * config["patch_size"] ** 2
    layer = 2 * width + _linear(width, 3 * width) + _linear(width, width) + 2 * _linear(width, inner) + _linear(inner, width)
    merged = width * config["spatial_merge_size"] ** 2
    return pixels * width + config["depth"] * layer + width + _linear(merged, merged) + _linear(merged, out)


def vae_parameters(config: Mapping[str, Any]) -> int:
    base, latent, blocks, pixels = config["base_dim"], config["z_dim"], config["num_res_blocks"], config["input_channels"]
    widths = [base * factor for factor in config["dim_mult"]]
    in_time = [*config["temperal_downsample"], None]  # None: the last level has no resampling
    last = widths[-1]
    middle = 2 * _residual(last, last) + last + _linear(last, 3 * last) + _linear(last, last)

    encoder = _conv(pixels, base, 27) + middle + last + _conv(last, 2 * latent, 27)
    for before, after, timed in zip([base, *widths], widths, in_time, strict=False):
        encoder += _residual(before, after) + (blocks - 1) * _residual(after, after)
        if timed is not None:
            encoder += _conv(after, after, 9) + (_conv(after, after, 3) if timed else 0)

    decoder = _conv(latent, last, 27) + middle + widths[0] + _conv(widths[0], pixels, 27)
    upward = widths[::-1]
    in_time = [*config["temperal_downsample"][::-1], None]
    for level, (after, timed) in enumerate(zip(upward, in_time, strict=False)):
        before = upward[level - 1] // 2 if level else last  # each upsampling halves the channels
        decoder += _residual(before, after) + blocks * _residual(after, after)
        if timed is not None:
            decoder += _conv(after, after // 2, 9) + (_conv(after, 2 * after, 3) if timed else 0)
    return encoder + decoder + _linear(2 * latent, 2 * latent) + _linear(latent, latent)


def _linear(inputs: int, outputs: int) -> int:
    return inputs * outputs + outputs


def _conv(inputs: int, outputs: int, kernel: int) -> int:
    return inputs * outputs * kernel + outputs


def _residual(before: int, after: int) -> int:
    shortcut = _conv(before, after, 1) if before != after else 0
    return before + _conv(before, after, 27) + after + _conv(after, after, 27) + shortcut
