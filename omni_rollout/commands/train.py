"""`omni-rollout train`."""

from __future__ import annotations

import argparse

from omni_rollout.commands import Commands, add_command
from omni_rollout.launch.help import TRAIN_KEYS


def add(commands: Commands[argparse.ArgumentParser]) -> None:
    train = add_command(commands, "train", run, "train a policy against rewards", TRAIN_KEYS)
    train.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="Hydra overrides; start from an experiment: experiment=nano_ocr"
    )


def run(parsed: argparse.Namespace) -> int:
    from omni_rollout.config import Backend
    from omni_rollout.launch.compose import compose
    from omni_rollout.launch.validate import validate
    from omni_rollout.rollout.start import say_family_defaults

    config = compose(parsed.overrides)
    validate(config)
    say_family_defaults(config)
    if config.launch.slurm:
        from omni_rollout.integrations.slurm import submit

        submit(config, parsed.overrides)
        return 0
    if config.backend is Backend.verl:
        from omni_rollout.integrations.verl.launch import train
    else:
        from omni_rollout.launch.progress import quieten_libraries

        quieten_libraries(config.model.path)
        from omni_rollout.train import train

    train(config)
    return 0
