"""How wide the transformer sees a text: `collate.width` of each kind on the same prompts, in turns in one engine."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from benchmarks.speed.contenders import Ours
from benchmarks.speed.shapes import COLOURS, GROUP, Shape
from benchmarks.speed.turns import Process, ratios, rounds, together

KINDS = ("fixed", "bucketed", "natural")
# prompts -> (text tokens at most, words after each prompt in turn): as short as nano's own, and of very different lengths
PROMPTS: Mapping[str, tuple[int, Sequence[int]]] = {"alike": (16, (0,)), "mixed": (128, (0, 20, 45, 100))}


class Collating(Ours):
    """Our engine, asked through a collator as `train` asks it."""

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape, "exact")

    def collated(self, number: int, prompts: str, kind: str) -> float:
        """A round of groups; the share of text tokens that was padding."""
        from transformers import AutoTokenizer

        from omni_rollout.config import CollateConfig, SamplingConfig, Width
        from omni_rollout.data.collate import Collator
        from omni_rollout.types import Prompt

        shape, (width, words) = self.shape, PROMPTS[prompts]
        tokenizer = AutoTokenizer.from_pretrained(shape.path, subfolder="tokenizer")
        sampling = SamplingConfig(
            height=shape.pixels,
            width=shape.pixels,
            num_inference_steps=shape.steps,
            true_cfg_scale=shape.true_cfg_scale,
            negative_prompt=" " if shape.guided else None,
        )
        own = len(KINDS) * number + KINDS.index(kind)  # texts that no kind has had before: the engine keeps what it has encoded
        collator = Collator("qwen_image", tokenizer, sampling, CollateConfig(width=Width(kind), prompt_width=width))
        texts = [
            " ".join([COLOURS[(number + index) % len(COLOURS)], f"sign {own:02d}", *["sign"] * words[index % len(words)]])
            for index in range(shape.images // GROUP)
        ]
        asked = collator.groups([Prompt(text=text) for text in texts], number, GROUP)
        assert sum(1 for _ in self.engine.generate(asked)) == len(asked)
        return collator.padding(asked)


def widths(shape: Shape, number: int) -> dict[str, Any]:
    """Of each sort of prompts: padding of each kind, and how fast it is as a multiple of `fixed`, round by round."""
    process = Process("widths", Collating, replace(shape, images=4 * GROUP), threads=shape.threads)
    found: dict[str, Any] = {}
    with together({"widths": process}):
        for prompts in PROMPTS:
            seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
            padding: dict[str, float] = {}
            for turn, order in rounds(KINDS, number + 1):
                for kind in order:
                    padding[kind], taken = process.ask("collated", turn, prompts, kind)
                    if turn > 1:
                        seconds[kind].append(taken)
            fast = {kind: ratios(seconds[kind], seconds["fixed"]) for kind in KINDS}
            found[prompts] = {"width": PROMPTS[prompts][0], "padding": padding, "as_fast_as_fixed": fast}
    return {"shape": shape.name, "guided": shape.guided, "prompts": found, "load": os.getloadavg()[0]}
