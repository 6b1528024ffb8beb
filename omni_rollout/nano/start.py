"""What every build of a nano model begins with."""

from pathlib import Path

import torch

from omni_rollout.errors import UserError
from omni_rollout.launch.paths import recipe_dir
from omni_rollout.nano.components import check_seed


def begin(seed: int, threads: int) -> None:
    """Sets torch's threads. Raises UserError for a seed or a number of threads that cannot be."""
    check_seed(seed)
    if threads < 1:
        raise UserError(f"threads={threads}: expected at least 1")
    torch.set_num_threads(threads)


def nano_checkpoint(start: Path | None, part: str) -> Path:
    """`start`, or the recipe's nano Qwen-Image. Raises UserError where it has no such part."""
    start = start or recipe_dir("nano") / "checkpoint"
    if not (start / part).is_dir():
        raise UserError(f"{start}: no nano Qwen-Image to start from; `omni-rollout nano build --out {start.parent}` makes it")
    return start
