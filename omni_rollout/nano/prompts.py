"""Prompt files of the recipes: what reinforcement learning trains on, and what its evaluation asks for."""

import json
import random
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from PIL import Image

from omni_rollout.nano import render

NUMBERS = {"train": (*render.TRAIN_NUMBERS, *render.DIGITS), "heldout": render.HELD_OUT}
"""File -> its numbers. No training picture and no training prompt shows a held-out one."""

Row = Mapping[str, str]


def write_prompts(folder: Path, splits: Mapping[str, Iterable[Row]]) -> None:
    """One `NAME.jsonl` for each."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in splits.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_pictures(
    folder: Path,
    pictures: Mapping[str, int],
    sample: Callable[[random.Random, str, str], render.Sign],
    rows_of: Callable[[render.Sign, str], Iterable[Row]],
    apart: int = 1,
) -> None:
    """`{train,heldout}.jsonl` and the pictures in `images/` that their prompts speak of.

    Args:
        pictures: file -> how many of each number, in different colours.
        sample: makes a sign of a text and a colour.
        rows_of: the prompts of a sign, and the name of its picture.
        apart: colours that lie between those of one number.
    """
    (folder / "images").mkdir(parents=True, exist_ok=True)
    colors = list(render.COLORS)

    def rows(split: str) -> Iterable[Row]:
        for number, text in enumerate(NUMBERS[split]):
            rng = random.Random(f"{split} {text}")
            for place in range(pictures[split]):
                sign = sample(rng, text, colors[(number + apart * place) % len(colors)])
                image = f"images/{text}_{sign.color}.png"
                Image.fromarray(render.draw(sign)).save(folder / image)
                yield from rows_of(sign, image)

    write_prompts(folder, {split: rows(split) for split in NUMBERS})
