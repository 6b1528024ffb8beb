"""The recipe's prompts."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from omni_rollout.nano.prompts import Row, write_prompts
from omni_rollout.nano.wan.scenes import HELD_OUT, TRAIN, Task, prompt_for


def write_data(folder: Path) -> None:
    """`{train,heldout}.jsonl`. No training video shows what a held-out prompt asks for."""
    write_prompts(folder, {"train": _rows(TRAIN), "heldout": _rows(HELD_OUT)})


def _rows(tasks: Sequence[Task]) -> Iterator[Row]:
    for digit, color, direction in tasks:
        yield {"prompt": prompt_for(digit, color, direction), "text": digit, "color": color, "direction": direction}
