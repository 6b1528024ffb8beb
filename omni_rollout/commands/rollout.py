"""`omni-rollout rollout`."""

from __future__ import annotations

import argparse
from pathlib import Path

from omni_rollout.commands import Commands, add_command
from omni_rollout.errors import UserError
from omni_rollout.launch.help import ROLLOUT_KEYS


def add(commands: Commands[argparse.ArgumentParser]) -> None:
    rollout = add_command(
        commands,
        "rollout",
        run,
        "sample images and keep their trajectories: a capsule (*.safetensors) and a PNG for each",
        f"{ROLLOUT_KEYS}\nexample:\n  omni-rollout rollout model=nano prompts=prompts.txt out=rollouts rollout.group_size=4\n",
    )
    rollout.add_argument("overrides", nargs="+", metavar="KEY=VALUE", help="prompts=FILE, out=FOLDER and Hydra overrides")


def run(parsed: argparse.Namespace) -> int:
    from omni_rollout.launch.compose import compose
    from omni_rollout.launch.validate import validate_rollout

    out = [word.removeprefix("out=") for word in parsed.overrides if word.startswith("out=")]
    if len(out) != 1 or not out[0]:
        raise UserError("out has no value: give out=FOLDER, once" if not out else f"out is given as {out}: expected one folder")
    config = compose([word for word in parsed.overrides if not word.startswith("out=")], name="rollout")
    validate_rollout(config, out[0])
    from omni_rollout.rollout.start import rollout

    return rollout(config, Path(out[0]))
