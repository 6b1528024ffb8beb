"""JSON as the standard has it: Python's own reader takes NaN, and gives infinity for 1e999."""

from __future__ import annotations

import json
import math
from typing import Any, NoReturn


def loads(text: str) -> Any:
    """The value of one JSON text; every number in it is finite.

    Raises:
        ValueError: it is not JSON, or nested too deep to be read.
    """
    # The decoder's own search for spaces takes longer than a short text, and a capsule is twenty.
    start = len(text) - len(text.lstrip(_SPACES))
    try:
        value, end = _DECODER.raw_decode(text, start)
    except RecursionError:
        raise ValueError("nested too deep") from None
    if rest := text[end:].lstrip(_SPACES):
        raise json.JSONDecodeError("Extra data", text, len(text) - len(rest))
    return value


def _finite(text: str) -> float:
    number = float(text)
    return number if math.isfinite(number) else _refuse(text[:20])


def _refuse(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a finite number")


_SPACES = " \t\n\r"  # no others
_DECODER = json.JSONDecoder(parse_constant=_refuse, parse_float=_finite)
