"""`omni-rollout export`."""

from __future__ import annotations

import argparse
from pathlib import Path

from omni_rollout.commands import Commands, add_command

FROM_RUN = ("model", "parity")  # what a checkpoint settles
READS = ("model",)


def add(commands: Commands[argparse.ArgumentParser]) -> None:
    export = add_command(
        commands,
        "export",
        run,
        "write a checkpoint as what diffusers and ComfyUI load, with a model card",
        "examples:\n"
        "  omni-rollout export runs/mine --to pipeline --out exported\n"
        "  omni-rollout export runs/mine/checkpoints/step_00080 model.dtype=bfloat16 --to lora --out adapter\n",
    )
    export.add_argument(
        "checkpoint", metavar="RUN|STEP", help="a run folder (its newest checkpoint), or one of its checkpoints"
    )
    export.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="model.path=BASE where it has moved, model.dtype=...")
    export.add_argument("--to", required=True, choices=("pipeline", "transformer", "lora"))
    export.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write; must be new or empty")
    export.add_argument(
        "--weights", choices=("policy", "ema"), default="policy", help="ema: the average (default: %(default)s)"
    )


def run(parsed: argparse.Namespace) -> int:
    from omni_rollout.launch.compose import compose
    from omni_rollout.launch.validate import validate_export
    from omni_rollout.run.source import check_kind, find_source

    source = find_source(parsed.checkpoint, parsed.weights)
    assert source is not None
    if not any(word.startswith("model.dtype=") for word in parsed.overrides):
        parsed.overrides.append("model.dtype=float32")  # the masters, whatever the run computed in
    settings = source.settings(FROM_RUN)
    config = compose(parsed.overrides, name="export", unused=["prompts"], reads=READS, settings=settings)
    check_kind(source, parsed.to)
    validate_export(config, str(parsed.out))
    from omni_rollout.launch.progress import progress_of

    with progress_of(config.model.path, f"writing {source.name}, as {parsed.to}"):
        from omni_rollout.run.export import export

        export(config, source, parsed.to, parsed.out)
    print(f"{parsed.to} of {source.name}, {config.model.dtype.value}, with its README.md: {parsed.out}")
    return 0
