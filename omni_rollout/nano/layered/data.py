"""The recipe's prompts and their pictures."""

import json
import random
from pathlib import Path

from PIL import Image

from omni_rollout.nano import render
from omni_rollout.nano.layered.pictures import sample_sign

SPLITS = {"train": (*render.TRAIN_NUMBERS, *render.DIGITS), "heldout": render.HELD_OUT}
"""File -> its numbers. No training picture and no training prompt shows a held-out one."""
PICTURES = {"train": 1, "heldout": 6}
"""Of each number, in different colours."""


def write_data(folder: Path) -> None:
    """`{train,heldout}.jsonl` and `images/`."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for name, numbers in SPLITS.items():
        rows = [row for number, text in enumerate(numbers) for row in _rows(folder, name, number, text)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def _rows(folder: Path, split: str, number: int, text: str) -> list[dict[str, str]]:
    rng, colors = random.Random(f"{split} {text}"), list(render.COLORS)
    rows = []
    for place in range(PICTURES[split]):
        sign = sample_sign(rng, text, colors[(number + place) % len(colors)])
        image = f"images/{text}_{sign.color}.png"
        Image.fromarray(render.draw(sign)).save(folder / image)
        rows.append({"prompt": render.prompt_for(text, sign.color), "images": image, "text": text, "color": sign.color})
    return rows
