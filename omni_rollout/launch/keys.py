"""Which keys there are, what each takes, and what may have been meant by one that is not there."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import is_dataclass
from enum import Enum
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

from omegaconf import OmegaConf

from omni_rollout import plugins
from omni_rollout.config import AlgorithmConfig, TrainConfig
from omni_rollout.errors import UserError
from omni_rollout.launch import aliases

_PIECE = 3  # letters of a name that tell it
_WORDS = {  # type -> one of it, and several
    int: ("a whole number", "whole numbers"),
    float: ("a number", "numbers"),
    bool: ("true or false", "true or false"),
    str: ("text", "texts"),
    Any: ("a value", "values"),
}


def kind_of(key: str) -> Any:
    """The type that the schema gives a key (a dataclass for a section); None: there is no such key."""
    kind: Any = TrainConfig
    for part in key.split("."):
        if get_origin(kind) is dict:
            kind = get_args(kind)[1]
        elif is_dataclass(kind):
            # An algorithm's own keys are checked when it is known which one was chosen.
            kind = _fields(kind).get(part, Any if kind is AlgorithmConfig else None)
        else:
            return None
    return kind


def _fields(section: Any) -> dict[str, Any]:
    return {name: _without_none(hint) for name, hint in get_type_hints(section).items()}


def _without_none(hint: Any) -> Any:
    return next(kind for kind in get_args(hint) if kind is not NoneType) if isinstance(hint, UnionType) else hint


def is_free(key: str) -> bool:
    """Whether a key holds names of the user's choosing, such as the rewards' weights."""
    return bool(key) and get_origin(kind_of(key)) is dict


def keys(section: Any = TrainConfig, prefix: str = "") -> list[str]:
    """All of the schema, dotted."""
    found: list[str] = []
    for name, kind in _fields(section).items():
        found += keys(kind, f"{prefix}{name}.") if is_dataclass(kind) else [f"{prefix}{name}"]
    return found


def expectation(kind: Any, given: str) -> str:
    """What a key of this type takes, where `given` does not fit."""
    if isinstance(kind, type) and issubclass(kind, Enum):
        return nearest(given.partition("=")[2], [member.name for member in kind])
    if get_origin(kind) is list:
        return f"expected a list of {_WORDS[get_args(kind)[0]][1]}, such as [1,2]"
    if get_origin(kind) is dict:
        return f"expected {{NAME: {_WORDS[get_args(kind)[1]][0]}}}"
    return f"expected {_WORDS[kind][0] if kind in _WORDS else 'a section of keys'}"


def unknown_key(key: str) -> UserError:
    hint = meant(key, difflib.get_close_matches(key, keys(), n=1))
    return UserError(f"{key}: no such key; {hint or 'there are ' + ', '.join(OmegaConf.structured(TrainConfig))}")


def meant(key: str, near: Sequence[str]) -> str:
    """What of ours may have been meant, as a sentence; `near`: if nothing better is found."""
    same_leaf = [candidate for candidate in keys() if candidate.rpartition(".")[2] == key.rpartition(".")[2]]
    alias = aliases.meant(key, last_is_ours=bool(same_leaf))
    if alias is not None:
        ours, note = alias
        return f"did you mean {ours}?{f' ({note})' if note else ''}" if ours else note
    return f"did you mean {' or '.join(same_leaf or near)}?" if same_leaf or near else ""


def nearest(given: str, choices: Sequence[str], *, prefix: str = "") -> str:
    near = near_to(given, choices)
    return f"{f'did you mean {prefix}{near}? ' if near else ''}expected one of {', '.join(choices) or 'none'}"


def near_to(given: str, choices: Sequence[str]) -> str | None:
    """The choice that `given` is a piece of, the default or else the shortest of several; else one that is spelt alike."""
    given = given.lower().replace("-", "_")
    holding = [choice for choice in choices if given in choice] if len(given) >= _PIECE else []
    if holding:
        return min(holding, key=lambda choice: (choice != AlgorithmConfig.name, len(choice)))
    return next(iter(difflib.get_close_matches(given, choices, n=1)), None)


def deleted(key: str) -> UserError:
    """Of `~key`, where the schema says which keys there are."""
    if kind_of(key) is None:
        return unknown_key(key)
    return UserError(f"~{key}: a key cannot be taken away; leave it out for its default, or give {key}=VALUE")


def own_reward(key: str, source: str) -> UserError:
    """Of a reward of the user's own where only a name, or a name for it, is taken."""
    place, _, function = source.rpartition(":") if plugins.is_function(source) else (source, "", "NAME")
    name, where = function, source if place != source or plugins.is_address(source) else f"{source}:NAME"
    return UserError(
        f"{key}={source}: a reward of your own needs a name and a weight; "
        f"give 'reward.weights={{{name}: 1.0}}' reward.source.{name}={where}"
    )
