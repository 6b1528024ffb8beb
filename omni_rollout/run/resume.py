"""The run folder as a run finds it when it goes on, and what a checkpoint says of its run.

find_start ─► a checkpoint, or none ─► enter: the folder is what it was at that moment ─► the loop
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from omni_rollout.config import TrainConfig
from omni_rollout.data.prompts import prompts_digest
from omni_rollout.errors import UserError
from omni_rollout.policy.state import BEHAVIOUR, RunState
from omni_rollout.run.folder import EVALUATIONS, ORIGIN, START_IMAGES
from omni_rollout.run.start import NOT_KEPT, Start, changed_keys, flat, run_dir_of
from omni_rollout.trajectories.journal import Journal

FILES = ("metrics.jsonl", "seeds.jsonl")  # of a run folder: they only grow, step after step


def enter(config: TrainConfig, start: Start) -> None:
    """Cuts what a run wrote after its checkpoint off the run folder, or brings the files of another run's folder here."""
    run_dir = Path(config.run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    source = run_dir_of(start.checkpoint) if start.checkpoint is not None else run_dir
    if start.checkpoint is not None and source != run_dir.absolute():
        (run_dir / ORIGIN).write_text(str(start.checkpoint), encoding="utf-8")
    logged = max((line["step"] for line in _json_lines(source / "metrics.jsonl")), default=0)
    for name in FILES:
        _keep_lines(source / name, run_dir / name, start.run.lines.get(name, 0) if start.run is not None else 0)
    _bring_evaluations(source, run_dir, start)
    repeated, kept = max(logged - start.step, 0), Journal(run_dir).count(after=start.step)
    what = f"{kept} finished trajectories kept, {repeated} steps to repeat"
    if start.run is not None:
        print(f"resumed from {start.checkpoint}, step {start.step}: {what}", flush=True)
        for key, (before, now) in sorted(changed_keys(config, start.run.config).items()):
            print(f"changed since: {key}={before} -> {now}")
    elif config.trainer.resume == "auto":
        print(f"no checkpoint in {run_dir / 'checkpoints'}: starts from the beginning, {what}", flush=True)


def run_state(config: TrainConfig, *, step: int, weights: str, wandb_id: str | None, lines: Mapping[str, int]) -> RunState:
    """What a checkpoint of this run says of it."""
    kept = {key: value for key, value in flat(config).items() if not key.startswith(NOT_KEPT)}
    prompts = prompts_digest(config.prompts)
    return RunState(step=step, weights=weights, prompts=prompts, wandb_id=wandb_id, lines=dict(lines), config=kept)


def check_weights(start: Start, digest: str) -> None:
    """Raises UserError where the policy that was restored is not the one that was saved."""
    if start.run is not None and digest != start.run.weights:
        raise UserError(
            f"{start.checkpoint} gives weights {digest[:16]}, but {start.run.weights[:16]} were saved: the model at model.path "
            "is another than the run was started from; give that model"
        )


def behaviour_version(start: Start) -> int:
    """Of the policy that samples the first batch of a run with rollout.ahead=1: the one before the checkpoint's latest update,
    where it was kept, for that has sampled it in a run that was never stopped."""
    kept = start.checkpoint is not None and (start.checkpoint / BEHAVIOUR).is_dir()
    return start.step - 1 if kept else start.step


def _bring_evaluations(source: Path, run_dir: Path, start: Start) -> None:
    """What later evaluations are compared with, and how the images of earlier ones were scored."""
    first = source / START_IMAGES
    if start.run is not None and source != run_dir.absolute() and first.is_file():
        shutil.copyfile(first, run_dir / START_IMAGES)
    before = (line for line in _json_lines(source / EVALUATIONS) if start.run is not None and line["step"] <= start.step)
    _keep_lines(source / EVALUATIONS, run_dir / EVALUATIONS, sum(1 for _ in before))


def _keep_lines(source: Path, target: Path, number: int) -> None:
    """Makes `target` the first lines of `source`, at once."""
    if not source.is_file():
        if number:
            print(f"{source} is not there: {target.name} begins with this run", file=sys.stderr)
        return
    with source.open("rb") as file:
        lines = [line for _, line in zip(range(number), file, strict=False)]
    if len(lines) < number:
        print(f"{source} has {len(lines)} lines, {number} when the checkpoint was made: some are lost", file=sys.stderr)
    part = target.with_name(f".{target.name}.part")
    part.write_bytes(b"".join(lines))
    os.replace(part, target)


def _json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Up to the first that is not whole: a run may have died while it wrote the last."""
    if path.is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                yield json.loads(line)
            except ValueError:
                return
