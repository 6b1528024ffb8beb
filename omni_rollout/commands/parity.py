"""`omni-rollout parity`."""

from __future__ import annotations

import argparse
from pathlib import Path

from omni_rollout.commands import Commands, add_command, own_words
from omni_rollout.launch.help import CHECKPOINT_KEYS

FROM_RUN = ("model", "sampling", "parity", "threads", "trainer.clip_range")  # what a checkpoint settles
READS = (*FROM_RUN, "trainer.micro_batch_size", "trainer.lora_rank")


def add(commands: Commands[argparse.ArgumentParser]) -> None:
    parity = add_command(
        commands,
        "parity",
        run,
        "prove that engine and trainer agree bit for bit, or name what makes them differ (exit status 1)",
        f"keys:\n{CHECKPOINT_KEYS}\nexample:\n"
        "  omni-rollout parity model=nano --json p.json --html p.html --matrix dtype=bfloat16 in_flight=1,8\n",
    )
    parity.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="Hydra overrides: model=nano or model.path=FOLDER")
    parity.add_argument("--html", type=Path, metavar="FILE", help="write a page with plots")
    parity.add_argument(
        "--matrix",
        nargs="+",
        default=[],
        metavar="WORD",
        help="what to measure; by default dtype=float32,bfloat16 guidance=1.0,4.0 width=natural,64,256 "
        "in_flight=1,3,8,staggered images=8 causes=true compile=false true_width=true; with dtype, guidance, width or "
        "in_flight given, true_width=false",
    )
    parity.add_argument("--json", type=Path, metavar="FILE", help="write the figures as JSON")


def run(parsed: argparse.Namespace) -> int:
    from omni_rollout.launch.compose import compose
    from omni_rollout.launch.validate import validate_scoring
    from omni_rollout.run.source import find_source

    own, overrides = own_words(parsed.overrides, ("checkpoint", "checkpoint_weights"))
    source = find_source(own["checkpoint"], own["checkpoint_weights"])
    settings = None if source is None else source.settings(FROM_RUN)
    config = compose(overrides, name="parity", unused=["prompts", "model.path"], reads=READS, settings=settings)
    validate_scoring(config, {"--json": parsed.json, "--html": parsed.html}, path_needed=False)
    from omni_rollout.launch.imports import imported_for_good
    from omni_rollout.launch.progress import progress_of
    from omni_rollout.parity.matrix import Matrix

    matrix = Matrix.parse(parsed.matrix)  # a typo must not wait for the engine's libraries
    with progress_of(config.model.path, "loading torch and the engine") as progress:
        with imported_for_good():
            from omni_rollout.nano.random_weights import build_random
            from omni_rollout.parity.reported import parity

        files = {"json_path": parsed.json, "html_path": parsed.html}
        return parity(config, **files, matrix=matrix, progress=progress, build_random=build_random, source=source)
