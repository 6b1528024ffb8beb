"""The recipe's prompts and their pictures."""

import json
import random
from pathlib import Path

from PIL import Image

from omni_rollout.nano import render
from omni_rollout.nano.edit.pairs import Edit, other_colors

SPLITS = {"train": (*render.TRAIN_NUMBERS, *render.DIGITS), "heldout": render.HELD_OUT}
"""File -> its numbers. No training picture and no training prompt shows a held-out one."""
PICTURES = {"train": 1, "heldout": 2}
"""Of each number, in different colours."""


def write_data(folder: Path) -> None:
    """`{train,heldout}.jsonl` and `images/`: every picture with every colour but its own to be given."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for name, numbers in SPLITS.items():
        rows = [row for number, text in enumerate(numbers) for row in _rows(folder, name, number, text)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def _rows(folder: Path, split: str, number: int, text: str) -> list[dict[str, str]]:
    rng, colors = random.Random(f"{split} {text}"), list(render.COLORS)
    rows = []
    for place in range(PICTURES[split]):
        source = render.sample_sign(rng, text, colors[(number + 3 * place) % len(colors)])
        image = f"images/{text}_{source.color}.png"
        Image.fromarray(render.draw(source)).save(folder / image)
        edits = [Edit(source, color) for color in other_colors(source.color)]
        rows += [{"prompt": edit.prompt, "images": image, "text": text, "color": edit.color} for edit in edits]
    return rows
