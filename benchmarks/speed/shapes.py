"""What is measured: a model, and what is asked of it. The same requests go to every contender."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
GROUP = 8  # images of one prompt, as a GRPO step has them
NEGATIVE = " "
COLOURS = ("red", "blue", "green", "black", "orange", "purple")  # each a token of the nano model: all prompts are as long

# name -> sizes of a random model, or None: the trained one of recipes/nano
MODELS: dict[str, dict[str, int] | None] = {
    "nano": None,
    "tiny": {"layers": 1, "heads": 2, "head_dim": 16, "joint_dim": 32},
    "balanced": {"layers": 3, "heads": 6, "head_dim": 128, "joint_dim": 128},
    "wide": {"layers": 1, "heads": 24, "head_dim": 128, "joint_dim": 128},
}


@dataclass(frozen=True, kw_only=True)
class Shape:
    """One row of the table."""

    name: str
    model: str  # of MODELS
    pixels: int  # a side
    steps: int
    images: int  # in a round
    in_flight: int
    true_cfg_scale: float = 1.0  # above 1: guidance
    dtype: str = "float32"
    prompt_width: int = 16  # text tokens, of both branches
    threads: int = 2
    path: str = ""  # of the checkpoint, once it is made

    @property
    def guided(self) -> bool:
        return self.true_cfg_scale > 1

    @property
    def tokens(self) -> int:
        """Of an image: a token is 16 x 16 pixels."""
        return (self.pixels // 16) ** 2


def prompts(shape: Shape, number: int) -> list[str]:
    """Of round `number`, an image each. Every round has its own, so no cache holds them from the round before."""
    groups = -(-shape.images // GROUP)
    return [_prompt(number * groups + index // GROUP) for index in range(shape.images)]


def _prompt(number: int) -> str:
    colour = COLOURS[number // 100 % len(COLOURS)]
    return f'a {colour} sign that says "{number % 100:02d}"'


def seed(number: int, index: int) -> int:
    return 1000 * number + index


def _balanced(name: str, scale: float, dtype: str) -> Shape:
    sizes: dict[str, Any] = {"model": "balanced", "pixels": 256, "steps": 4, "images": 8, "in_flight": 8}
    return Shape(name=name, true_cfg_scale=scale, dtype=dtype, **sizes)


SHAPES = {
    shape.name: shape
    for shape in (
        Shape(name="nano-8", model="nano", pixels=64, steps=10, images=32, in_flight=8),
        Shape(name="nano-32", model="nano", pixels=64, steps=10, images=32, in_flight=32),
        _balanced("balanced-g4-fp32", 4.0, "float32"),
        _balanced("balanced-g1-fp32", 1.0, "float32"),
        _balanced("balanced-g4-bf16", 4.0, "bfloat16"),
        _balanced("balanced-g1-bf16", 1.0, "bfloat16"),
        Shape(name="long-fp32", model="balanced", pixels=512, steps=4, images=2, in_flight=2),
        Shape(name="long-bf16", model="balanced", pixels=512, steps=4, images=2, in_flight=2, dtype="bfloat16"),
        Shape(name="wide-bf16", model="wide", pixels=256, steps=4, images=4, in_flight=4, true_cfg_scale=4.0, dtype="bfloat16"),
        Shape(name="wide-fp32", model="wide", pixels=256, steps=2, images=4, in_flight=4, true_cfg_scale=4.0),
    )
}
QUICK = Shape(name="tiny", model="tiny", pixels=32, steps=2, images=4, in_flight=2, true_cfg_scale=4.0)


def checkpoint(model: str, dtype: str, folder: Path) -> str:
    """Where the model lies, every part of it in `dtype`: the stock engine wants that. What is not there is made in `folder`."""
    sizes, path = MODELS[model], folder / f"{model}-{dtype}"
    if sizes is None and dtype == "float32":
        return str(ROOT / "recipes" / "nano" / "checkpoint")
    if not path.exists():
        if dtype == "float32":
            from omni_rollout.nano.random_weights import build_random

            build_random(path, seed=3, **(sizes or {}))
        else:
            import torch
            from diffusers import QwenImagePipeline

            whole = checkpoint(model, "float32", folder)
            QwenImagePipeline.from_pretrained(whole, torch_dtype=getattr(torch, dtype)).save_pretrained(path)
    return str(path)
