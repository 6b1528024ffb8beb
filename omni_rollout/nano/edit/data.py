"""The recipe's prompts and their pictures."""

from collections.abc import Iterator
from pathlib import Path

from omni_rollout.nano import render
from omni_rollout.nano.edit.pairs import Edit, other_colors
from omni_rollout.nano.prompts import Row, write_pictures


def write_data(folder: Path) -> None:
    """`{train,heldout}.jsonl` and `images/`: every picture with every colour but its own to be given."""
    write_pictures(folder, {"train": 1, "heldout": 2}, render.sample_sign, _rows, apart=3)


def _rows(source: render.Sign, image: str) -> Iterator[Row]:
    for edit in (Edit(source, color) for color in other_colors(source.color)):
        yield {"prompt": edit.prompt, "images": image, "text": source.text, "color": edit.color}
