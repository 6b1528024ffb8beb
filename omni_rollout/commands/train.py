"""`omni-rollout train`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from omni_rollout.commands import Commands, add_command, own_words
from omni_rollout.errors import UserError
from omni_rollout.launch.help import TRAIN_KEYS

if TYPE_CHECKING:
    from omni_rollout.config import TrainConfig
    from omni_rollout.run.before import Prompts


def add(commands: Commands[argparse.ArgumentParser]) -> None:
    train = add_command(commands, "train", run, "train a policy against rewards", TRAIN_KEYS)
    train.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="Hydra overrides; start from an experiment: experiment=nano_ocr"
    )


def run(parsed: argparse.Namespace) -> int:
    from omni_rollout.config import AUTO
    from omni_rollout.launch.compose import compose
    from omni_rollout.launch.validate import validate
    from omni_rollout.rollout.start import say_family_defaults
    from omni_rollout.run.before import check_before
    from omni_rollout.run.folder import note_command
    from omni_rollout.run.start import check_has_a_folder

    own, overrides = own_words(parsed.overrides, ("dry_run", "gpus"))
    if own["dry_run"] not in (None, "true", "false"):
        raise UserError(f"dry_run={own['dry_run']}: expected true or false")
    dry = own["dry_run"] == "true"
    if own["gpus"] is not None and not dry:
        raise UserError(f"gpus={own['gpus']}: train takes the GPUs that are there; give dry_run=true too, or omni-rollout plan")
    config = compose(overrides)
    check_has_a_folder(config, overrides)
    if config.trainer.fit == AUTO and not config.launch.slurm:  # there, the job sees the machine
        from omni_rollout.plan.fit import fitted

        overrides, told = fitted(overrides, own["gpus"])
        config = compose(overrides)
        print(told)
    validate(config)
    prompts = check_before(config)
    say_family_defaults(config)
    if dry:
        return _dry_run(config, prompts, own["gpus"])
    if config.launch.slurm:
        from omni_rollout.integrations.slurm import submit, write_script

        script = write_script(config, overrides)
        note_command(config.run_dir, parsed.overrides)  # before sbatch, which may refuse
        if config.launch.submit:
            submit(script)
        return 0
    note_command(config.run_dir, parsed.overrides)
    return _train(config, prompts)


def _dry_run(config: TrainConfig, prompts: Prompts, gpus: str | None) -> int:
    from omni_rollout.plan.needs import needs
    from omni_rollout.run.before import header

    fits, memory = needs(config, gpus)
    print("\n".join([*header(config, prompts), *memory]))
    seen = prompts.fit or _widths_fit(config)
    unseen = "" if seen else f"; not how wide the prompts are: {config.model.path} is no folder with a tokenizer"
    checked = "paths, prompts, rewards and the run folder are as they should be"
    print(f"dry run: {checked}{unseen}; no policy was loaded, nothing written")
    return 0 if fits else 1


def _widths_fit(config: TrainConfig) -> bool:
    """False: there is no tokenizer to tell by. Raises UserError: a prompt that does not fit."""
    if not Path(config.model.path, "tokenizer").is_dir():
        return False
    from omni_rollout.run.material import Material

    Material.of(config)
    return True


def _train(config: TrainConfig, prompts: Prompts) -> int:
    from omni_rollout.config import Backend
    from omni_rollout.launch.imports import imported_for_good
    from omni_rollout.launch.progress import progress_of
    from omni_rollout.run.before import header

    print("\n".join(header(config, prompts)), flush=True)
    if config.backend is Backend.verl:
        with imported_for_good():
            from omni_rollout.integrations.verl.launch import train as train_on_ray

        train_on_ray(config)
        return 0
    with progress_of(config.model.path, "loading torch and the engine") as progress:
        with imported_for_good():
            from omni_rollout.train import train

        train(config, progress)
    return 0
