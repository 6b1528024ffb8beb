"""Processes that die and that nothing replaces in place: who died, and how often the run was started again."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import (
    GetTimeoutError,
    LocalRayletDiedError,
    NodeDiedError,
    ObjectLostError,
    RayActorError,
    RayTaskError,
    WorkerCrashedError,
)

DEATHS = (RayActorError, WorkerCrashedError, NodeDiedError, ObjectLostError, LocalRayletDiedError)
PATIENCE = 60.0  # seconds for a worker to answer whether it is there


def cause_of(error: BaseException) -> BaseException:
    """What was raised in the process where it all began."""
    while isinstance(error, RayTaskError) and isinstance(error.cause, BaseException):
        error = error.cause
    return error


def describe(error: BaseException) -> str:
    """One line: what Ray says first, and which kind of process it was."""
    text = str(error)
    kind = re.search(r"class_name: (\w+)", text)
    return text.splitlines()[0] + (f" ({kind.group(1)})" if kind else "")


def find_dead(workers: Sequence[Any], error: BaseException) -> None:
    """Raises RayActorError where one of the workers is dead: the others then complain of a connection, not of a death."""
    if isinstance(cause_of(error), DEATHS):
        return
    for worker in workers:
        try:
            ray.get(worker.__ray_ready__.remote(), timeout=PATIENCE)
        except RayActorError as death:
            raise death from error
        except GetTimeoutError:  # it is busy, not dead
            continue


def note_restart(run_dir: str, why: str) -> None:
    """A line in `run_dir/restarts.jsonl`."""
    with (Path(run_dir) / "restarts.jsonl").open("a") as file:
        file.write(json.dumps({"why": why}) + "\n")


def restarts(run_dir: str) -> int:
    path = Path(run_dir) / "restarts.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0
