"""`omni-rollout plan`."""

from __future__ import annotations

import argparse
from pathlib import Path

from omni_rollout.commands import Commands, add_command


def add(commands: Commands[argparse.ArgumentParser]) -> None:
    plan = add_command(
        commands,
        "plan",
        run,
        "say what a run needs of GPUs and hosts, and whether it fits (exit status 1 if not); needs no GPU",
        "example:\n  omni-rollout plan model=qwen_image trainer.engine=fsdp2 trainer.lora_rank=64 gpus=2x8x80\n",
    )
    plan.add_argument("overrides", nargs="+", metavar="KEY=VALUE", help="gpus=[NODESx]GPUSxGIB, Hydra overrides")
    plan.add_argument("--json", type=Path, metavar="FILE", help="write the figures as JSON")


def run(parsed: argparse.Namespace) -> int:
    from omni_rollout.plan.closest import plan

    return plan(parsed.overrides, json_path=parsed.json)
