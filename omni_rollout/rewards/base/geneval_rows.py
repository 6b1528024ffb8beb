"""What GenEval's rows ask for, read and checked: its own columns `include`, `exclude` and `tag` (arXiv 2310.11513)."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from omni_rollout.errors import UserError
from omni_rollout.rewards.base.contract import Columns

CONFIDENCE, COUNTING_CONFIDENCE = 0.3, 0.9
MOST = 16  # objects of a class
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
RELATIONS = ("left of", "right of", "above", "below")
KEYS = {"include": ("class", "count", "color", "position"), "exclude": ("class", "count")}  # the first two must be there
NAMES = {  # COCO's, of this or that detector -> GenEval's
    **{"motorbike": "motorcycle", "aeroplane": "airplane", "sofa": "couch", "pottedplant": "potted plant"},
    **{"diningtable": "dining table", "tvmonitor": "tv"},
    **{"mouse": "computer mouse", "remote": "tv remote", "keyboard": "computer keyboard"},
}


@dataclass(frozen=True, kw_only=True)
class Clause:
    """Objects of one class that an image should show, or should not."""

    name: str
    count: int
    color: str | None = None
    position: tuple[str, int] | None = None  # relation, and to which earlier clause


@dataclass(frozen=True, kw_only=True)
class Asked:
    include: tuple[Clause, ...]
    exclude: tuple[Clause, ...]
    confidence: float  # above which an object is one


def asked_of(prompt: str, columns: Columns, known: Collection[str]) -> Asked:
    """What a prompt asks for.

    Args:
        known: classes, as GenEval names them.

    Raises:
        UserError: its columns are not GenEval's, or name another class, colour or relation.
    """
    try:
        include, exclude = (tuple(_clauses(columns, key, known)) for key in KEYS)
        if not include and not exclude:
            raise ValueError('asks for no object; expected metadata `include`, such as [{"class": "dog", "count": 1}]')
        tag = columns.get("tag")
        if not isinstance(tag, str | None):
            raise ValueError(f"`tag` is {tag!r}; expected a word such as counting, or none")
    except ValueError as error:
        raise UserError(f"geneval: prompt {prompt!r}: {error}") from error
    return Asked(include=include, exclude=exclude, confidence=COUNTING_CONFIDENCE if tag == "counting" else CONFIDENCE)


def _clauses(columns: Columns, key: str, known: Collection[str]) -> Iterator[Clause]:
    given = columns.get(key)
    if given is None:
        given = []
    if not isinstance(given, list):
        raise ValueError(f"`{key}` is {given!r}; expected a list of objects with {' and '.join(KEYS[key][:2])}")
    for place, clause in enumerate(given):
        try:
            yield _clause(clause, KEYS[key], place, known)
        except ValueError as error:
            raise ValueError(f"`{key}`[{place}]: {error}") from error


def _clause(given: Any, keys: Sequence[str], place: int, known: Collection[str]) -> Clause:
    """Raises ValueError: what was given, what was expected."""
    if not isinstance(given, Mapping) or not set(keys[:2]) <= given.keys() <= set(keys):
        raise ValueError(f"is {given!r}; expected an object with {', '.join(keys[:2])}, and of {', '.join(keys)} no other")
    name, count, color, position = (given.get(key) for key in KEYS["include"])
    name = NAMES.get(name, name) if isinstance(name, str) else name
    if not isinstance(name, str) or name not in known:
        near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.0)
        raise ValueError(f"the detector knows no {name!r}; did you mean {near[0]!r}? It knows {', '.join(known)}")
    if type(count) is not int or count < 1 or count > MOST:
        raise ValueError(f"count is {count!r}; expected 1 to {MOST}")
    if color is not None and color not in COLORS:
        raise ValueError(f"color is {color!r}; expected one of {', '.join(COLORS)}")
    if position is not None:
        position = _position(position, place)
    return Clause(name=name, count=count, color=color, position=position)


def _position(given: Any, place: int) -> tuple[str, int]:
    if not (
        isinstance(given, list)
        and len(given) == 2
        and given[0] in RELATIONS
        and type(given[1]) is int
        and 0 <= given[1] < place
    ):
        expected = f"one of {', '.join(RELATIONS)}, and the place in the list, from 0, of an object before this one"
        raise ValueError(f"position is {given!r}; expected a list of {expected}")
    return given[0], given[1]
