"""`omni-rollout evaluate`."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from omni_rollout.commands import Commands, add_command, own_words
from omni_rollout.errors import UserError
from omni_rollout.launch.help import CHECKPOINT_KEYS

# what a checkpoint settles
FROM_RUN = ("model", "collate", "sampling", "parity", "threads", "reward", "evaluation", "prompts", "rollout.max_num_seqs")
READS = ("model", "collate", "sampling", "parity", "threads", "reward", "evaluation", "rollout.max_num_seqs", "rollout.timeout")


def add(commands: Commands[argparse.ArgumentParser]) -> None:
    evaluate = add_command(
        commands,
        "evaluate",
        run,
        "score held-out images of a model or a checkpoint: deterministic (ode), fixed seeds",
        "keys:\n  out=FOLDER                              metrics.json, index.jsonl, the images and grid.png\n"
        f"{CHECKPOINT_KEYS}"
        "  evaluation.prompts=FILE                 held-out prompts; without: the run's own\n"
        "  evaluation.images, .seed                how many (0: one of every prompt), and their seeds\n"
        "  reward=NAME, model.*, sampling.*, ...\n\n"
        "examples:\n"
        "  omni-rollout evaluate checkpoint=runs/mine out=evaluated\n"
        "  omni-rollout evaluate experiment=nano_ocr out=before\n",
    )
    evaluate.add_argument("overrides", nargs="+", metavar="KEY=VALUE", help="out=FOLDER, checkpoint=RUN|STEP, Hydra overrides")


def run(parsed: argparse.Namespace) -> int:
    from omni_rollout.launch.compose import compose
    from omni_rollout.launch.validate import validate_evaluate
    from omni_rollout.run.source import find_source

    own, overrides = own_words(parsed.overrides, ("out", "checkpoint", "checkpoint_weights"))
    if own["out"] is None:
        raise UserError("out has no value: give out=FOLDER, for the metrics and the images")
    source = find_source(own["checkpoint"], own["checkpoint_weights"])
    settings = None if source is None else source.settings(FROM_RUN)
    config = compose(overrides, name="evaluate", unused=["prompts"], reads=READS, settings=settings)
    config = replace(config, prompts=config.evaluation.prompts or config.prompts)
    if not config.prompts:
        raise UserError("evaluation.prompts has no value: give evaluation.prompts=FILE (.txt, .jsonl or .parquet)")
    validate_evaluate(config, own["out"])
    from omni_rollout.launch.imports import imported_for_good
    from omni_rollout.launch.progress import progress_of

    with progress_of(config.model.path, "loading torch and the engine") as progress:
        with imported_for_good():
            from omni_rollout.run.evaluate import evaluate

        metrics = evaluate(config, Path(own["out"]), progress, source)
    print(f"weights: {config.model.path if source is None else source.name}")
    for name, value in metrics.items():
        print(f"{name:<28} {value:.4f}")
    print(f"metrics.json, index.jsonl and grid.png: {own['out']}")
    return 0
