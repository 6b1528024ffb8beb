"""The checkpoints that lie in a run folder. Loads no torch."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from omni_rollout.errors import UserError
from omni_rollout.policy.state import RunState, verify

START_IMAGES = "evaluation_start.npz"  # in a run folder: the starting policy's images, see `monitor.hacking`
EVALUATIONS = "evaluation.jsonl"  # a line an image and evaluation
COMMANDS = "command.txt"  # in a run folder: what was typed, a line each time that it was started or went on
ORIGIN = "origin"  # in a run folder: the checkpoint of another run that it went on from


def note_command(run_dir: str | Path, words: Sequence[str]) -> None:
    """Adds `omni-rollout train WORDS` to the run folder."""
    folder = Path(run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / COMMANDS).open("a", encoding="utf-8") as file:
        file.write(shlex.join(["omni-rollout", "train", *words]) + "\n")


def checkpoint_folders(run_dir: str | Path) -> list[Path]:
    """Newest first, complete ones alone; whether they are whole is for `policy.state.verify` to say."""
    return sorted(filter(is_step, Path(run_dir).glob("checkpoints/step_*")), key=step_of, reverse=True)


def candidates(run_dir: str | Path) -> list[Path]:
    """What a run can go on from, best first: its own, then the one that it came from."""
    origin = Path(run_dir) / ORIGIN
    return [*checkpoint_folders(run_dir), *([Path(origin.read_text(encoding="utf-8"))] if origin.is_file() else [])]


def newest_whole(folders: list[Path]) -> tuple[Path, RunState] | None:
    """The first of `folders` whose every file is what was saved; those before it are said, and passed over."""
    for folder in folders:
        try:
            return folder, verify(folder)
        except UserError as error:
            print(f"checkpoint {folder.name} is passed over, for the one before it: {error}", file=sys.stderr, flush=True)
    return None


def is_step(folder: Path) -> bool:
    """Whether a checkpoint has the name that a run gives; a copy beside it, such as step_00010.bak, has not."""
    return re.fullmatch(r"step_[0-9]+", folder.name) is not None


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step_"))
