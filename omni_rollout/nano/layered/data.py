"""The recipe's prompts and their pictures."""

from pathlib import Path

from omni_rollout.nano import render
from omni_rollout.nano.layered.pictures import sample_sign
from omni_rollout.nano.prompts import Row, write_pictures


def write_data(folder: Path) -> None:
    """`{train,heldout}.jsonl` and `images/`."""
    write_pictures(folder, {"train": 1, "heldout": 6}, sample_sign, _rows)


def _rows(sign: render.Sign, image: str) -> list[Row]:
    return [{"prompt": render.prompt_for(sign.text, sign.color), "images": image, "text": sign.text, "color": sign.color}]
