"""The command that looks into a finding, with what the run was given: to be pasted, not to be completed."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from omegaconf import OmegaConf

from omni_rollout.config import TrainConfig

# What decides the bits of a log-prob, and clip_range, their measure: of that, what `parity` reads.
_PARITY = ("model", "sampling", "trainer.clip_range", "trainer.lora_rank", "parity", "threads")
_PLAIN = re.compile(r"(?!(?:null|true|false|nan|inf)$)[a-z/~][\w./~+-]*", re.IGNORECASE)
_NOT_REPEATED = ("run_dir", "wandb", "experiment", "monitor")


def parity_command(config: TrainConfig) -> str:
    return _command("parity", [f"{key}={value}" for key, value in _changed(config) if _within(key, _PARITY)])


def train_command(config: TrainConfig, *extra: str) -> str:
    """The same run again: equal seeds give equal steps. `extra` overrides win over the run's own."""
    replaced = [override.partition("=")[0] for override in extra]
    own = [f"{key}={value}" for key, value in _changed(config) if not _within(key, (*_NOT_REPEATED, *replaced))]
    return _command("train", [*own, *extra])


def _command(name: str, overrides: Sequence[str]) -> str:
    return shlex.join(["omni-rollout", name, *overrides])


def _within(key: str, sections: Sequence[str]) -> bool:
    return any(key == section or key.startswith(f"{section}.") for section in sections)


def _changed(config: TrainConfig) -> Iterator[tuple[str, str]]:
    """(key, value as an override writes it) of everything that is not the default."""
    defaults = dict(flat_values(_plain(TrainConfig(algorithm=type(config.algorithm)()))))
    for key, value in flat_values(_plain(config)):
        if value != defaults.get(key):
            yield key, override_value(value)


def _plain(config: TrainConfig) -> dict[str, Any]:
    values: Any = OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True)
    return values


def flat_values(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(key, value) of every leaf of a configuration."""
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and name != "reward.weights":  # names of the user's choosing: given as a whole
            yield from flat_values(value, f"{name}.")
        else:
            yield name, value


def override_value(value: Any) -> str:
    """The value in Hydra's grammar of overrides."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}: {override_value(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(override_value(item) for item in value) + "]"
    text = str(value)
    if not isinstance(value, str) or _PLAIN.fullmatch(text):
        return text
    # Hydra's rule: a backslash is itself, except in a row of them before a quote.
    escaped = re.sub(r'(\\*)("|$)', lambda match: match[1] * 2 + ('\\"' if match[2] else ""), text)
    return f'"{escaped}"'
