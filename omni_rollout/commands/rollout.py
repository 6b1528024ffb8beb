"""`omni-rollout rollout`."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omni_rollout.commands import Commands, add_command, own_words
from omni_rollout.errors import UserError
from omni_rollout.launch.help import CHECKPOINT_KEYS, ROLLOUT_KEYS

if TYPE_CHECKING:
    from omni_rollout.config import TrainConfig
    from omni_rollout.run.source import Source

FROM_RUN = ("model", "collate", "sampling", "parity", "threads", "rollout.max_num_seqs")  # what a checkpoint settles
READS = (*FROM_RUN, "rollout.group_size", "prompts")


def add(commands: Commands[argparse.ArgumentParser]) -> None:
    rollout = add_command(
        commands,
        "rollout",
        run,
        "sample images and keep their trajectories: a capsule (*.safetensors) and a PNG for each",
        f"{ROLLOUT_KEYS}{CHECKPOINT_KEYS}\nexamples:\n"
        "  omni-rollout rollout model=nano prompts=prompts.txt out=rollouts rollout.group_size=4\n"
        "  omni-rollout rollout checkpoint=runs/mine prompts=prompts.txt out=trained sampling.sde_type=ode\n",
    )
    rollout.add_argument("overrides", nargs="+", metavar="KEY=VALUE", help="prompts=FILE, out=FOLDER and Hydra overrides")


def run(parsed: argparse.Namespace) -> int:
    from omni_rollout.launch.compose import compose
    from omni_rollout.launch.validate import validate_rollout
    from omni_rollout.run.source import find_source

    own, overrides = own_words(parsed.overrides, ("out", "checkpoint", "checkpoint_weights"))
    if own["out"] is None:
        raise UserError("out has no value: give out=FOLDER, for the images and their capsules")
    source = find_source(own["checkpoint"], own["checkpoint_weights"])
    settings = None if source is None else source.settings(FROM_RUN)
    config = compose(overrides, name="rollout", reads=READS, settings=settings)
    validate_rollout(config, own["out"])
    from omni_rollout.rollout.start import rollout

    if source is None:
        return rollout(config, Path(own["out"]))
    return rollout(config, Path(own["out"]), source.name, partial(_put_into, config=config, source=source))


def _put_into(engine: Any, *, config: TrainConfig, source: Source) -> None:
    from omni_rollout.run.restore import put_into

    put_into(engine, config, source)
