"""`omni-rollout nano build` and `nano random`."""

from __future__ import annotations

import argparse
from importlib import import_module
from pathlib import Path

from omni_rollout.commands import Commands, add_command
from omni_rollout.errors import UserError
from omni_rollout.launch.outputs import folder_problem
from omni_rollout.models import families

NANO_BUILDS = {
    "qwen_image": "omni_rollout.nano.build",
    "qwen_image_edit": "omni_rollout.nano.edit.build",
    "qwen_image_layered": "omni_rollout.nano.layered.build",
    "wan2_2": "omni_rollout.nano.wan.build",
}


def add(commands: Commands[argparse.ArgumentParser]) -> None:
    nano = commands.add_parser("nano", help="make the nano model, Qwen-Image in miniature").add_subparsers(
        required=True, metavar="COMMAND"
    )
    build = add_command(
        nano,
        "build",
        _nano_build,
        "train it (minutes)",
        "example:\n  omni-rollout nano build --out recipes/nano\n  "
        "omni-rollout nano build --family qwen_image_edit --out recipes/nano_edit\n",
    )
    build.add_argument(
        "--family",
        choices=sorted(NANO_BUILDS),
        default="qwen_image",
        help="qwen_image from nothing; the others from recipes/nano (default: %(default)s)",
    )
    build.add_argument("--threads", type=int, default=1, help="of torch; the weights depend on it (default: %(default)s)")
    random = add_command(
        nano,
        "random",
        _nano_random,
        "any family's architecture in any size, with random weights",
        "example:\n  omni-rollout nano random --family qwen_image --out /tmp/model --layers 2 --heads 4\n",
    )
    random.add_argument("--family", choices=families(), default="qwen_image", help="(default: %(default)s)")
    random.add_argument("--layers", type=int, default=2, help="transformer blocks (default: %(default)s)")
    random.add_argument("--heads", type=int, default=4, help="attention heads (default: %(default)s)")
    random.add_argument("--head-dim", "--dim", type=int, default=32, help="width of a head (default: %(default)s)")
    random.add_argument("--joint-dim", type=int, default=64, help="width of the prompt embeddings (default: %(default)s)")
    for command in (build, random):
        command.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write")
        command.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")


def _nano_build(parsed: argparse.Namespace) -> int:
    _check_out(parsed.out)
    build = import_module(NANO_BUILDS[parsed.family]).build
    build(parsed.out, seed=parsed.seed, threads=parsed.threads)
    return 0


def _nano_random(parsed: argparse.Namespace) -> int:
    _check_out(parsed.out)
    from omni_rollout.nano.random_weights import build_random

    build_random(
        parsed.out,
        family=parsed.family,
        layers=parsed.layers,
        heads=parsed.heads,
        head_dim=parsed.head_dim,
        joint_dim=parsed.joint_dim,
        seed=parsed.seed,
    )
    return 0


def _check_out(out: Path) -> None:
    problem = folder_problem(out)
    if problem is not None:
        raise UserError(f"--out {out}: {problem}")
