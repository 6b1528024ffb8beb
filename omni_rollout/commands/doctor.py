"""`omni-rollout doctor`."""

from __future__ import annotations

import argparse

from omni_rollout.commands import Commands, add_command


def add(commands: Commands[argparse.ArgumentParser]) -> None:
    doctor = add_command(commands, "doctor", run, "say what is installed, what is broken and what to do", "")
    doctor.add_argument(
        "--fix", action="store_true", help="uninstall torchvision, torchaudio and torchcodec if they do not load"
    )


def run(parsed: argparse.Namespace) -> int:
    from omni_rollout.launch.doctor import doctor

    return doctor(fix=parsed.fix)
