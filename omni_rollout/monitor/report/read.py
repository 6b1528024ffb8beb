"""A run folder, read for its page. Nothing in it is trusted: what is not what a run writes is left out, and said."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import yaml
from safetensors import SafetensorError, safe_open

from omni_rollout.errors import UserError
from omni_rollout.monitor.pairs import PPO_KL_COMPARES
from omni_rollout.monitor.suggested import flat_values
from omni_rollout.policy.state import STATE
from omni_rollout.run.folder import COMMANDS, EVALUATIONS
from omni_rollout.trajectories import strict_json

Line = dict[str, Any]
_NUMBERS = ("actor/", "critic/", "evaluation/", "guard/", "parity/", "perf/", "rollout_corr/", "timing_s/")  # metrics of a step
_TEXTS = (PPO_KL_COMPARES, "guard/lost")  # notes that are named like them


@dataclass(frozen=True, kw_only=True)
class Score:
    """What an evaluation found of one image."""

    prompt: str
    reward: float | None
    guards: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Run:
    folder: Path
    config: Mapping[str, Any]  # key -> value, flat
    lines: list[Line]  # of metrics.jsonl
    scores: Mapping[int, Mapping[int, Score]]  # step of an evaluation -> index of the image
    states: list[Mapping[str, Any]]  # `run` of the checkpoints' state.json, oldest first
    typed: str  # the commands that started it, a line each; empty: it was not started by the command
    fingerprint: Mapping[str, Any]  # of a trajectory that was kept; empty: none was
    unread: list[str]  # a sentence for each thing that could not be read

    @property
    def name(self) -> str:
        return self.folder.absolute().name

    def points(self, key: str) -> list[tuple[int, float | None]]:
        """(step, value) of a metric wherever it was logged; None was not finite."""
        return [(line["step"], line[key]) for line in self.lines if key in line]

    def numbers(self, key: str) -> list[float]:
        return [value for _, value in self.points(key) if value is not None]


def read_run(folder: Path) -> Run:
    """Raises UserError: the folder is no run's."""
    expected = "expected the folder of a run (run_dir=...), with its config.yaml"
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; {expected}")
    try:
        config: Any = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{folder} is no run folder: it has no config.yaml; {expected}") from None
    except (yaml.YAMLError, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{folder}/config.yaml cannot be read ({str(error).splitlines()[0]}); {expected}") from error
    sections = isinstance(config, dict) and all(
        isinstance(config.get(name), dict) for name in ("trainer", "model", "algorithm")
    )
    if not sections:
        raise UserError(f"{folder}/config.yaml is not what a run writes (no trainer, model, algorithm); {expected}")
    unread: list[str] = []
    lines = [cast(Line, line) for line in _records(folder / "metrics.jsonl", _is_line, unread)]
    steps = {line["step"] for line in lines}
    scores: dict[int, dict[int, Score]] = {}
    for each in _records(folder / EVALUATIONS, _is_score, unread):  # of a step that was repeated, the last holds
        if each["step"] in steps:
            score = Score(prompt=each["prompt"], reward=each["reward"], guards=each["guards"])
            scores.setdefault(each["step"], {})[each["index"]] = score
    return Run(
        folder=folder,
        config=dict(flat_values(config)),
        lines=lines,
        scores=dict(sorted(scores.items())),
        states=_states(folder, unread),
        typed=_typed(folder, unread),
        fingerprint=_fingerprint(folder, unread),
        unread=unread,
    )


def _typed(folder: Path, unread: list[str]) -> str:
    try:
        return (folder / COMMANDS).read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return ""
    except OSError as error:
        unread.append(f"{COMMANDS} cannot be read: {error.strerror}")
        return ""


def _records(path: Path, is_one: Callable[[Any], bool], unread: list[str]) -> list[dict[str, Any]]:
    """The lines of a file that are what was written there; a process that was killed may have left half a line."""
    try:
        texts = path.read_bytes().splitlines()
    except FileNotFoundError:
        return []
    except OSError as error:
        unread.append(f"{path.name} cannot be read: {error.strerror}")
        return []
    found, wrong = [], []
    for number, text in enumerate(texts, 1):
        try:
            value = strict_json.loads(text.decode())
        except ValueError:
            value = None
        (found if is_one(value) else wrong).append(value if is_one(value) else number)
    if wrong:
        which = ", ".join(map(str, wrong[:5])) + ("" if len(wrong) <= 5 else ", ...")
        unread.append(f"{path.name}: left out {len(wrong)} of {len(texts)} lines that are not what a run writes ({which})")
    return found


def _is_line(value: Any) -> bool:
    if not isinstance(value, dict) or not _is_index(value.get("step")):
        return False
    return all(
        item is None or _is_number(item) or (isinstance(item, str) and (key in _TEXTS or not key.startswith(_NUMBERS)))
        for key, item in value.items()
    )


def _is_score(value: Any) -> bool:
    if not isinstance(value, dict) or not _is_index(value.get("step")) or not _is_index(value.get("index")):
        return False
    reward, guards = value.get("reward"), value.get("guards")
    scored = (reward is None or _is_number(reward)) and isinstance(guards, dict) and all(map(_is_number, guards.values()))
    return scored and isinstance(value.get("prompt"), str)


def _is_index(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 10**9


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def _states(folder: Path, unread: list[str]) -> list[Mapping[str, Any]]:
    """Read as they stand: whether their files are whole is for a command that loads them to say."""
    found: list[Mapping[str, Any]] = []
    for path in sorted(folder.glob(f"checkpoints/step_*/{STATE}")):
        try:
            state = strict_json.loads(path.read_text(encoding="utf-8"))["run"]
            found.append({"step": int(state["step"]), "weights": str(state["weights"]), "prompts": str(state["prompts"])})
        except (ValueError, LookupError, TypeError, OSError):
            unread.append(f"{path.parent.name}/{STATE} is not what was saved")
    return found


def _fingerprint(folder: Path, unread: list[str]) -> Mapping[str, Any]:
    """Of the newest trajectory that the run kept: the header of a capsule alone is read."""
    capsules = sorted(folder.glob("rollout/step_*/*.safetensors"))
    if not capsules:
        return {}
    try:
        with safe_open(capsules[-1], framework="numpy") as file:
            found = strict_json.loads((file.metadata() or {}).get("fingerprint", "{}"))
        return found if isinstance(found, dict) else {}
    except (SafetensorError, OSError, ValueError) as error:
        unread.append(f"{capsules[-1].name} cannot be read: {error}")
        return {}
