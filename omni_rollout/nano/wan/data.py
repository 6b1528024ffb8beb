"""The recipe's prompts."""

import json
from pathlib import Path

from omni_rollout.nano.wan.scenes import HELD_OUT, TRAIN, prompt_for

SPLITS = {"train": TRAIN, "heldout": HELD_OUT}
"""File -> what its prompts ask for. No training video shows a held-out one."""


def write_data(folder: Path) -> None:
    """`{train,heldout}.jsonl`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, tasks in SPLITS.items():
        rows = []
        for digit, color, direction in tasks:
            prompt = prompt_for(digit, color, direction)
            rows.append({"prompt": prompt, "text": digit, "color": color, "direction": direction})
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
