"""`omni-rollout replay`."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from omni_rollout.commands import Commands, add_command
from omni_rollout.errors import UserError
from omni_rollout.launch.help import REPLAY_STATUS


def add(commands: Commands[argparse.ArgumentParser]) -> None:
    replay = add_command(commands, "replay", run, "score capsules from any run or machine: do they still hold?", REPLAY_STATUS)
    replay.add_argument("words", nargs="+", metavar="CAPSULE|KEY=VALUE", help="files, and Hydra overrides for the checkpoint")
    replay.add_argument("--json", type=Path, metavar="FILE", help="write the figures as JSON")


def run(parsed: argparse.Namespace) -> int:
    from omni_rollout.launch.compose import compose
    from omni_rollout.launch.validate import validate_scoring

    overrides = [word for word in parsed.words if "=" in word and not os.path.isfile(word)]
    capsules = [Path(word) for word in parsed.words if word not in overrides]
    if not capsules:
        raise UserError("no capsule given: expected one or more *.safetensors files, and model=... for the checkpoint")
    config = compose(overrides, name="parity", unused=["prompts"])
    validate_scoring(config, {"--json": parsed.json})
    from omni_rollout.launch.progress import progress_of

    with progress_of(config.model.path, "loading torch") as progress:
        from omni_rollout.parity.command import replay

        return replay(capsules, config, json_path=parsed.json, progress=progress)
