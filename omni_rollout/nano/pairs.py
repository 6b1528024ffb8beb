"""A data set of signs: to each prompt the picture that it asks for, and one of another number in the same colour."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from omni_rollout.nano import render
from omni_rollout.nano.prompts import NUMBERS, Row, write_prompts


def write_pairs(folder: Path) -> None:
    """`train.jsonl` with the columns prompt, text, color, chosen and rejected, and `images/`; no held-out number is in it."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    write_prompts(folder, {"train": _rows(folder / "images")})


def _rows(images: Path) -> Iterator[Row]:
    colors = list(render.COLORS)
    of_color: dict[str, list[str]] = {}
    for number, text in enumerate(NUMBERS["train"]):
        of_color.setdefault(colors[number % len(colors)], []).append(text)
    for color, texts in of_color.items():
        for text, other in zip(texts, [*texts[1:], texts[0]], strict=True):
            sign = render.sample_sign(random.Random(f"pairs {text}"), text, color)
            Image.fromarray(render.draw(sign)).save(images / f"{text}_{color}.png")
            row = {"prompt": render.prompt_for(text, color), "text": text, "color": color}
            yield {**row, "chosen": f"{text}_{color}.png", "rejected": f"{other}_{color}.png"}
