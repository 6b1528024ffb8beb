"""`omni-rollout replay`."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from omni_rollout.commands import Commands, add_command, own_words
from omni_rollout.errors import UserError
from omni_rollout.launch.help import CHECKPOINT_KEYS, REPLAY_STATUS

FROM_RUN = ("model", "parity", "threads", "trainer.clip_range")  # what a checkpoint settles
READS = (*FROM_RUN, "sampling", "trainer.micro_batch_size")


def add(commands: Commands[argparse.ArgumentParser]) -> None:
    summary = "score capsules from any run or machine: do they still hold?"
    replay = add_command(commands, "replay", run, summary, f"keys:\n{CHECKPOINT_KEYS}{REPLAY_STATUS}")
    replay.add_argument("words", nargs="+", metavar="CAPSULE|KEY=VALUE", help="files, and Hydra overrides for the checkpoint")
    replay.add_argument("--json", type=Path, metavar="FILE", help="write the figures as JSON")


def run(parsed: argparse.Namespace) -> int:
    from omni_rollout.launch.compose import compose
    from omni_rollout.launch.validate import validate_scoring
    from omni_rollout.run.source import find_source

    overrides = [word for word in parsed.words if "=" in word and not os.path.isfile(word)]
    capsules = [Path(word) for word in parsed.words if word not in overrides]
    if not capsules:
        raise UserError("no capsule given: expected one or more *.safetensors files, and model=... or checkpoint=...")
    if folders := [path for path in capsules if path.is_dir()]:
        raise UserError(f"{folders[0]} is a folder: expected *.safetensors files; a run keeps its own in RUN/rollout/step_...")
    own, overrides = own_words(overrides, ("checkpoint", "checkpoint_weights"))
    source = find_source(own["checkpoint"], own["checkpoint_weights"])
    settings = None if source is None else source.settings(FROM_RUN)
    config = compose(overrides, name="replay", unused=["prompts"], reads=READS, settings=settings)
    validate_scoring(config, {"--json": parsed.json})
    from omni_rollout.launch.imports import imported_for_good
    from omni_rollout.launch.progress import progress_of

    with progress_of(config.model.path, "loading torch") as progress:
        with imported_for_good():
            from omni_rollout.parity.reported import replay

        return replay(capsules, config, json_path=parsed.json, progress=progress, source=source)
