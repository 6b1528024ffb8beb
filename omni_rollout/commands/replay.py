"""`omni-rollout replay`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from omni_rollout.commands import Commands, add_command, own_words
from omni_rollout.errors import UserError
from omni_rollout.launch.help import CHECKPOINT_KEYS, REPLAY_STATUS

FROM_RUN = ("model", "parity", "threads", "trainer.clip_range")  # what a checkpoint settles
READS = (*FROM_RUN, "sampling", "trainer.micro_batch_size")


def add(commands: Commands[argparse.ArgumentParser]) -> None:
    summary = "score capsules from any run or machine: do they still hold?"
    replay = add_command(commands, "replay", run, summary, f"keys:\n{CHECKPOINT_KEYS}{REPLAY_STATUS}")
    replay.add_argument("words", nargs="+", metavar="CAPSULE|KEY=VALUE", help="files, folders of them, and Hydra overrides")
    replay.add_argument("--json", type=Path, metavar="FILE", help="write the figures as JSON")


def run(parsed: argparse.Namespace) -> int:
    from omni_rollout.launch.compose import compose
    from omni_rollout.launch.validate import validate_scoring
    from omni_rollout.run.source import find_source

    overrides = [word for word in parsed.words if "=" in word and not os.path.exists(word)]
    capsules = [path for word in parsed.words if word not in overrides for path in _files(Path(word))]
    if not capsules:
        raise UserError("no capsule given: expected *.safetensors files or folders of them, and model=... or checkpoint=...")
    own, overrides = own_words(overrides, ("checkpoint", "checkpoint_weights"))
    source = find_source(own["checkpoint"], own["checkpoint_weights"])
    settings = None if source is None else source.settings(FROM_RUN)
    config = compose(overrides, name="replay", unused=["prompts"], reads=READS, settings=settings)
    validate_scoring(config, {"--json": parsed.json})
    _tell_unreadable(capsules)
    from omni_rollout.launch.imports import imported_for_good
    from omni_rollout.launch.progress import progress_of

    with progress_of(config.model.path, "loading torch") as progress:
        with imported_for_good():
            from omni_rollout.parity.reported import replay

        return replay(capsules, config, json_path=parsed.json, progress=progress, source=source)


def _files(path: Path) -> list[Path]:
    """The path itself, or of a folder the capsules in it."""
    if not path.is_dir():
        return [path]
    if (path / "state.json").is_file():
        raise UserError(f"{path}: a checkpoint's folder, no capsules: give it as checkpoint={path}, and what to score")
    if found := sorted(path.glob("*.safetensors")):
        return found
    run = path.parent if path.name == "rollout" else path
    kept = sorted({capsule.parent for capsule in run.glob("rollout/step_*/*.safetensors")})
    where = f"this run keeps them in {', '.join(map(str, kept))}" if kept else "a run keeps its own in RUN/rollout/step_..."
    raise UserError(f"{path}: a folder without *.safetensors files, so without capsules; {where}")


def _tell_unreadable(capsules: Sequence[Path]) -> None:
    """Says at once what would else be refused half a minute later, when torch is there. Raises UserError if none is left."""
    problems = [problem for path in capsules if (problem := _unreadable(path)) is not None]
    if len(problems) == len(capsules):
        raise UserError("\n".join(problems))
    for problem in problems:
        print(problem, file=sys.stderr, flush=True)


def _unreadable(path: Path) -> str | None:
    from safetensors import SafetensorError, safe_open

    if not path.exists():
        return f"{path}: no such file"
    try:
        with safe_open(path, framework="numpy") as file:  # reads the header alone, and whether the file is as long as it says
            told = file.metadata() or {}
        return None if "format_version" in told else f"{path}: no capsule, but a safetensors file of something else"
    except (SafetensorError, OSError) as error:
        return f"{path}: not a readable safetensors file ({error}); was it copied whole?"
