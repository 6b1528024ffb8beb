"""`checkpoint=RUN|STEP`: which checkpoint a command means, and what it was trained with. Loads no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omni_rollout.errors import UserError
from omni_rollout.policy.state import EMA, STATE, RunState, kind_of, read_state
from omni_rollout.run.folder import checkpoint_folders, newest_whole

WEIGHTS = ("policy", "ema")  # what `checkpoint_weights` may be


@dataclass(frozen=True, kw_only=True)
class Source:
    """A checkpoint to sample from, to score with or to export."""

    folder: Path
    run: RunState
    kind: str  # full or lora
    averaged: bool  # its average in place of its weights

    @property
    def weights_folder(self) -> Path:
        return self.folder / EMA if self.averaged else self.folder

    @property
    def name(self) -> str:
        """`runs/a/checkpoints/step_00010, step 10, LoRA, average of the weights`."""
        kind = "LoRA" if self.kind == "lora" else "full weights"
        return f"{self.folder}, step {self.run.step}, {kind}{', average of the weights' if self.averaged else ''}"

    def settings(self, sections: Sequence[str]) -> dict[str, Any]:
        """Key -> value, of what the checkpoint was trained with, in these sections."""
        prefixes = tuple(f"{section}." for section in sections)
        return {key: value for key, value in self.run.config.items() if key in sections or key.startswith(prefixes)}


def find_source(given: str | None, weights: str | None = None) -> Source | None:
    """None: none was given. A step's files are verified where they are loaded; of a run, its newest whole step is taken.

    Raises:
        UserError: no checkpoint there, none that is whole, or no average where that was asked for.
    """
    if weights is not None and weights not in WEIGHTS:
        raise UserError(f"checkpoint_weights={weights}: expected one of {', '.join(WEIGHTS)}")
    if given is None:
        if weights is not None:
            raise UserError(f"checkpoint_weights={weights}: of which checkpoint? give checkpoint=RUN|STEP too")
        return None
    folder, run = _checkpoint(Path(given))
    averaged = weights == "ema"
    if averaged and not (folder / EMA).is_dir():
        raise UserError(f"checkpoint_weights=ema: {folder} keeps no average (trainer.ema_decay was 0); leave it out")
    return Source(folder=folder, run=run, kind=kind_of(folder), averaged=averaged)


def check_kind(source: Source, to: str) -> None:
    """Raises UserError where what is to be exported is not in the checkpoint; reads no weights."""
    if to == "lora" and source.kind != "lora":
        raise UserError(
            f"--to lora: {source.folder} holds full weights (trainer.lora_rank was 0), so there is no adapter; "
            "give --to transformer or --to pipeline"
        )


def _checkpoint(path: Path) -> tuple[Path, RunState]:
    expected = "expected a run folder, or one of its checkpoints/step_..."
    if not path.is_dir():
        raise UserError(f"checkpoint={path}: no such folder; {expected}")
    if (path / STATE).is_file():
        return path, read_state(path)
    folders = checkpoint_folders(path)
    if not folders:
        raise UserError(f"checkpoint={path}: holds no checkpoint; {expected}")
    found = newest_whole(folders)
    if found is None:
        raise UserError(f"checkpoint={path}: none of its {len(folders)} checkpoints is whole, see above")
    return found
