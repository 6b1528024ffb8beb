"""Whether a run begins or goes on, from where, and whether it may: what lies in its folder decides.

find_start ─► a checkpoint, or none ─► enter: the folder is what it was at that moment ─► the loop
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from omni_rollout.config import TrainConfig
from omni_rollout.data.prompts import prompts_digest
from omni_rollout.errors import UserError
from omni_rollout.policy.checkpoint import RunState, read_state, verify
from omni_rollout.run.checkpoints import ORIGIN, candidates, checkpoint_folders
from omni_rollout.trajectories.journal import Journal

FILES = ("metrics.jsonl", "seeds.jsonl")  # of a run folder: they only grow, step after step
NOT_KEPT = ("run_dir", "experiment", "trainer.resume", "wandb.", "launch.")  # where and how, not what
MUST_BE_EQUAL = ("model.family", "model.dtype", "trainer.lora_rank", "trainer.lora_alpha")


@dataclass(frozen=True, kw_only=True)
class Start:
    """Where a run starts: from nothing, or after a checkpoint."""

    checkpoint: Path | None = None
    run: RunState | None = None

    @property
    def step(self) -> int:
        """Steps that are done."""
        return self.run.step if self.run is not None else 0


def find_start(config: TrainConfig) -> Start:
    """What trainer.resume asks for. Changes nothing on disk; with `auto`, a damaged checkpoint is said and passed over.

    Raises:
        UserError: a run lies in run_dir that this one would write over, a checkpoint that is not there, or one that this
            configuration cannot go on from.
    """
    wanted, run_dir = config.trainer.resume, Path(config.run_dir)
    if wanted == "auto":
        start = _newest(run_dir)
    elif wanted == "none":
        start = Start()
    else:
        start = Start(checkpoint=Path(wanted).absolute(), run=read_state(Path(wanted)))  # verified where it is loaded
    elsewhere = start.checkpoint is None or _run_dir_of(start.checkpoint) != run_dir.absolute()
    elsewhere = elsewhere and start.checkpoint not in candidates(run_dir)[:1]  # what `auto` would take may be named, too
    if wanted != "auto" and elsewhere and _holds_a_run(run_dir):
        raise UserError(f"run_dir={run_dir} holds a run already: give trainer.resume=auto to go on with it, or another run_dir")
    if start.run is not None:
        check_fits(config, start.run)
    return start


def enter(config: TrainConfig, start: Start) -> None:
    """Cuts what a run wrote after its checkpoint off the run folder, or brings the files of another run's folder here."""
    run_dir = Path(config.run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    source = _run_dir_of(start.checkpoint) if start.checkpoint is not None else run_dir
    if start.checkpoint is not None and source != run_dir.absolute():
        (run_dir / ORIGIN).write_text(str(start.checkpoint), encoding="utf-8")
    logged = max((line["step"] for line in _json_lines(source / "metrics.jsonl")), default=0)
    for name in FILES:
        _keep_lines(source / name, run_dir / name, start.run.lines.get(name, 0) if start.run is not None else 0)
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
    kept = {key: value for key, value in _flat(config).items() if not key.startswith(NOT_KEPT)}
    return RunState(
        step=step, weights=weights, prompts=prompts_digest(config.prompts), wandb_id=wandb_id, lines=dict(lines), config=kept
    )


def check_fits(config: TrainConfig, run: RunState) -> None:
    """Raises UserError, naming all keys with which going on from `run` would be another run."""
    changed = changed_keys(config, run.config)
    problems = [
        f"{key}={changed[key][1]}: the checkpoint of step {run.step} has {key}={changed[key][0]}; give that, or start a new run"
        for key in MUST_BE_EQUAL
        if key in changed
    ]
    if prompts_digest(config.prompts) != run.prompts:
        problems.append(
            f"prompts={config.prompts}: not the file that the checkpoint of step {run.step} was trained on (sha256 "
            f"{run.prompts[:16]}...), so a step would have other prompts; give that file, or start a new run"
        )
    if problems:
        raise UserError("\n".join(problems))


def check_weights(start: Start, digest: str) -> None:
    """Raises UserError where the policy that was restored is not the one that was saved."""
    if start.run is not None and digest != start.run.weights:
        raise UserError(
            f"{start.checkpoint} gives weights {digest[:16]}, but {start.run.weights[:16]} were saved: the model at model.path "
            "is another than the run was started from; give that model"
        )


def changed_keys(config: TrainConfig, before: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Key -> (value then, value now), of those that a checkpoint keeps; a key that one side lacks is None there."""
    now = {key: value for key, value in _flat(config).items() if not key.startswith(NOT_KEPT)}
    keys = before.keys() | now.keys()
    return {key: (before.get(key), now.get(key)) for key in keys if before.get(key) != now.get(key)}


def _newest(run_dir: Path) -> Start:
    for folder in candidates(run_dir.absolute()):
        try:
            return Start(checkpoint=folder, run=verify(folder))
        except UserError as error:
            print(f"checkpoint {folder.name} is passed over, for the one before it: {error}", file=sys.stderr, flush=True)
    return Start()


def _holds_a_run(run_dir: Path) -> bool:
    metrics = run_dir / "metrics.jsonl"
    return bool(checkpoint_folders(run_dir)) or (metrics.is_file() and metrics.stat().st_size > 0)


def _run_dir_of(checkpoint: Path) -> Path:
    return checkpoint.parent.parent


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


def _flat(config: TrainConfig) -> dict[str, Any]:
    values: Any = OmegaConf.to_container(OmegaConf.structured(config), resolve=True, enum_to_str=True)
    if values["trainer"]["lora_rank"] and values["trainer"]["lora_alpha"] is None:
        values["trainer"]["lora_alpha"] = 2 * values["trainer"]["lora_rank"]

    def leaves(section: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
        for key, value in section.items():
            if isinstance(value, dict):
                yield from leaves(value, f"{prefix}{key}.")
            else:
                yield f"{prefix}{key}", value

    return dict(leaves(values, ""))
