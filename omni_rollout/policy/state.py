"""What a checkpoint says of itself, `state.json`: read and checked before torch is loaded."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from omni_rollout.errors import UserError

FORMAT_VERSION = 2
STATE = "state.json"
EMA = "ema"  # folder of a checkpoint: the averaged weights, laid out like the checkpoint's own
OLD = "old"  # the same of the old policy, where the algorithm has one
BEHAVIOUR = "behaviour"  # the same of the policy that samples the next batch, with rollout.ahead=1
LORA = "lora"  # folder of an adapter; a second expert's is lora_2


@dataclass(frozen=True, kw_only=True)
class RunState:
    """Where a run stands after a step, beside its tensors."""

    step: int  # also the policy's version, the data's position and the learning rate's
    weights: str  # digest of what the rollout engine holds
    prompts: str = ""  # sha256 of the training prompts' file
    wandb_id: str | None = None
    lines: Mapping[str, int] = field(default_factory=dict)  # file of the run folder -> lines it had
    config: Mapping[str, Any] = field(default_factory=dict)  # key -> value, flat


def write_state(folder: Path, *, kind: str, run: RunState) -> None:
    """Closes a checkpoint whose other files are all there: `state.json` holds their sha256, and its own."""
    digests = {str(path.relative_to(folder)): file_digest(path) for path in sorted(folder.rglob("*")) if path.is_file()}
    state = {"format_version": FORMAT_VERSION, "kind": kind, "run": asdict(run), "files": digests}
    (folder / STATE).write_text(json.dumps({**state, "sha256": _digest_of(state)}, indent=2))


def read_state(folder: Path) -> RunState:
    """Raises UserError: no checkpoint there, one of another format, or a state.json that is not what was saved."""
    return RunState(**_checked_state(folder)["run"])


def kind_of(folder: Path) -> str:
    """`full` or `lora`; raises as `read_state` does."""
    return str(_checked_state(folder)["kind"])


def verify(folder: Path) -> RunState:
    """Reads every file of a checkpoint.

    Raises:
        UserError: the first that is missing or not what was saved.
    """
    state = _checked_state(folder)
    for name, digest in state["files"].items():
        path = folder / name
        if not path.is_file():
            raise UserError(f"{path} is missing, though {STATE} lists it: the checkpoint is incomplete; use another")
        if file_digest(path) != digest:
            raise UserError(
                f"{path} is not what was saved (its sha256 differs from {STATE}): it is damaged or was edited; use another"
            )
    return RunState(**state["run"])


def file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _checked_state(folder: Path) -> dict[str, Any]:
    path = folder / STATE
    if not path.is_file():
        raise UserError(f"{path} does not exist: expected the folder of a checkpoint, such as checkpoints/step_00010")
    try:
        state = json.loads(path.read_text())
        version, digest = state["format_version"], state.pop("sha256", None)
    except (ValueError, LookupError, TypeError) as error:
        raise UserError(f"{path} is not what was saved ({error}): it is damaged or was edited; use another") from error
    if version != FORMAT_VERSION:
        raise UserError(f"{path} has format_version {version}: this version reads {FORMAT_VERSION}")
    if _digest_of(state) != digest:
        raise UserError(f"{path} is not what was saved (its own sha256 differs): it is damaged or was edited; use another")
    return state


def _digest_of(state: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()
