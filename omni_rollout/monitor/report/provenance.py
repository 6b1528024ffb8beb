"""How to run it again: what was typed, a command of the configuration, what that changes, versions and digests."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from omegaconf import OmegaConf

from omni_rollout import __version__
from omni_rollout.config import TrainConfig
from omni_rollout.errors import UserError
from omni_rollout.launch.compose import compose
from omni_rollout.monitor.report.charts import sentence, table
from omni_rollout.monitor.report.read import Run
from omni_rollout.monitor.suggested import flat_values, override_value
from omni_rollout.policy.state import file_digest

_CHOICES = ("experiment", "algorithm.name")  # not keys to set: files to choose
NOT_TYPED = "It was started from Python, or by a version that kept no command"
_EVERY_TIME = "run_dir"  # its default is another every second


@dataclass(frozen=True, kw_only=True)
class Command:
    words: Sequence[str]
    differences: Mapping[str, tuple[Any, Any]]  # key -> (default, this run's)
    doubts: Sequence[str]  # sentences: why it may not give the same configuration


def section(run: Run) -> str:
    command = command_of(run)
    base = f"experiment={run.config['experiment']}" if run.config.get("experiment") else "the defaults"
    rows = [[key, override_value(before), override_value(now)] for key, (before, now) in command.differences.items()]
    return "".join(
        [
            "<h3>As it was typed</h3>",
            f"<pre>{escape(run.typed)}</pre>" if run.typed else sentence(NOT_TYPED),
            "<h3>A command that gives its configuration</h3>",
            f"<pre>{escape(shlex.join(command.words))}</pre>",
            *map(
                sentence,
                command.doubts or ["Composed when this page was made: it gives this run's configuration, key for key."],
            ),
            f"<h3>{escape(f'Different from {base}')}</h3>",
            table(["key", "default", "here"], rows, text=3) if rows else sentence("nothing"),
            "<h3>Digests</h3>",
            table([], digests(run), text=2),
            "<h3>Versions and machine</h3>",
            _versions(run),
        ]
    )


def command_of(run: Run) -> Command:
    """The command that gives the configuration of a run, without running any code that its folder names."""
    own, doubts = dict(run.config), list[str]()
    words, base = _base(own, doubts)
    changed = {key for key in own if own[key] != base.get(key) or key == _EVERY_TIME} - {*_CHOICES}
    differences = {key: (base.get(key), own[key]) for key in own if key in changed}
    unknown = [
        key for key in differences if key not in base and not key.startswith(("algorithm.", "reward.", "sampling.extra."))
    ]
    if unknown and base:
        doubts.append(f"This version of omni_rollout knows no {', '.join(unknown)}: the run is another version's.")
    words += [f"{key}={override_value(value)}" for key, (_, value) in differences.items() if key not in unknown]
    if not doubts and not own.get("algorithm.source"):
        try:
            again = _flat(compose(words))
            wrong = sorted(key for key in own.keys() | again.keys() if own.get(key) != again.get(key))
            doubts += [f"It does not give this run's {', '.join(wrong)}."] if wrong else []
        except UserError as error:
            doubts.append(f"This version refuses it: {error}.")
    elif own.get("algorithm.source"):
        doubts.append("Not tried: the algorithm is the run's own code, which a report does not execute.")
    return Command(words=["omni-rollout", "train", *words], differences=differences, doubts=doubts)


def _base(own: Mapping[str, Any], doubts: list[str]) -> tuple[list[str], dict[str, Any]]:
    """The words that choose files, and the configuration that they give by themselves."""
    words = [f"experiment={override_value(own['experiment'])}"] if own.get("experiment") else []
    try:
        base = _flat(_composed(words))
    except UserError as error:
        doubts.append(f"The experiment is not here ({error}); compared with the defaults.")
        words, base = [], _flat(_composed([]))
    name = own.get("algorithm.name")
    if name != base.get("algorithm.name") and not own.get("algorithm.source"):
        words.append(f"algorithm={override_value(name)}")
        try:
            base = _flat(_composed(words))
        except UserError as error:
            doubts.append(f"The algorithm is not here: {error}.")
    return words, base


def _composed(words: Sequence[str]) -> TrainConfig:
    return compose(words, unused=["model.path", "prompts"])


def _flat(config: TrainConfig) -> dict[str, Any]:
    values: Any = OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True)
    return dict(flat_values(values))


def digests(run: Run) -> list[list[str]]:
    weights = [(line["step"], line["weights/digest"]) for line in run.lines if isinstance(line.get("weights/digest"), str)]
    rows = [["sha256 of config.yaml", file_digest(run.folder / "config.yaml")]]
    if run.lines:
        rows.append(["sha256 of metrics.jsonl", file_digest(run.folder / "metrics.jsonl")])
    if run.states:
        rows.append(["sha256 of the training prompts", str(run.states[-1]["prompts"])])
    if weights:
        rows.append([f"weights that sampled step {weights[0][0]}", weights[0][1]])
    if len(weights) > 1:
        rows.append([f"weights that sampled step {weights[-1][0]}", weights[-1][1]])
    return rows + [[f"weights of checkpoint step {state['step']}", str(state["weights"])] for state in run.states]


def _versions(run: Run) -> str:
    if not run.fingerprint:
        told = sentence("No trajectory was kept, whose fingerprint holds them (rollout.keep_finished).")
    else:
        rows = [[key, override_value(value)] for key, value in flat_values(run.fingerprint)]
        told = f"<details><summary>Fingerprint of the newest trajectory</summary>{table([], rows, text=2)}</details>"
    return told + sentence(f"This page was made by omni_rollout {__version__}.")
