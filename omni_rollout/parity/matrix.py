"""The settings under which the engine and the trainer are compared, and the requests that stand for each."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from enum import Enum
from itertools import product
from typing import Any

from omni_rollout.config import SamplingConfig
from omni_rollout.errors import UserError
from omni_rollout.models import family_module
from omni_rollout.types import Prompt, RolloutRequest

PROMPTS = ("a photo of a cat", 'a red sign that says "42"', "dog", 'a blue sign that says "7"')  # of four lengths
NATURAL, STAGGERED = "natural", "staggered"


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """Every combination is one cell.

    `width`: text tokens of both branches, or `natural`: each text exactly as wide as it is, so nothing is padded.
    `in_flight`: images submitted together, or `staggered`: images of different step counts, half as many again as the
    engine has places, so that they enter and leave a batch at different steps.
    """

    dtype: tuple[str, ...] = ("float32", "bfloat16")
    guidance: tuple[float, ...] = (1.0, 4.0)
    width: tuple[str, ...] = (NATURAL, "64", "256")
    in_flight: tuple[str, ...] = ("1", "3", "8", STAGGERED)
    images: int = 8  # per cell; also the engine's places
    causes: bool = True  # measure what each broken rule would cost
    compile: bool = False  # among the causes; compiling takes minutes
    true_width: bool = True  # also one block of Qwen-Image's own width, in a matrix of its own; `parse` has its default

    @classmethod
    def parse(cls, words: Sequence[str]) -> Matrix:
        """From words such as `dtype=float32`, `guidance=1.0,4.0`, `width=natural,64`, `in_flight=1,staggered`, `causes=false`.

        Raises:
            UserError: an unknown name, a value that fits none of the above, or one that is given twice.
        """
        values: dict[str, Any] = {}
        known = [item.name for item in fields(cls)]
        for word in words:
            name, _, text = word.partition("=")
            if name not in known or not text:
                told = f"expected NAME=VALUE[,VALUE...] with a name of {', '.join(known)}; all other keys go before --matrix"
                raise UserError(f"{word}: {told}")
            if name in values:
                raise UserError(f"{word}: {name} is given twice; give it once, as {name}=VALUE,VALUE")
            values[name] = _value(name, text)
        narrowed = values.keys() & {item.name for item in fields(Cell)}  # who asks for some cells wants those alone
        return cls(**{"true_width": not narrowed, **values})


@dataclass(frozen=True, kw_only=True)
class Cell:
    dtype: str
    guidance: float
    width: str
    in_flight: str


def cells(matrix: Matrix, dtype: str) -> Iterator[Cell]:
    for guidance, width, in_flight in product(matrix.guidance, matrix.width, matrix.in_flight):
        yield Cell(dtype=dtype, guidance=guidance, width=width, in_flight=in_flight)


def requests(cell: Cell, sampling: SamplingConfig, family: str, tokenizer: Any, images: int) -> list[RolloutRequest]:
    """The cell's images; all but the last step stochastic.

    Raises:
        RequestError: the config's sampling parameters cannot be served.
    """
    spec, probe = family_module(family, "spec"), family_module(family, "probe")
    given = {item.name: getattr(sampling, item.name) for item in fields(sampling)}
    values = {
        **{key: given[key] if given[key] is not None else small for key, small in probe.SMALL.items() if key != "extra"},
        "extra": {**probe.SMALL.get("extra", {}), **given["extra"]},
        **{key: _plain(given[key]) for key in ("negative_prompt", "noise_level", "sde_type", "log_prob_form")},
        "true_cfg_scale": cell.guidance,
    }
    negative = values["negative_prompt"] or spec.RULES.negative_prompt
    result = []
    for number in range(images * 3 // 2 if cell.in_flight == STAGGERED else images):
        text, pictures = PROMPTS[number % len(PROMPTS)], probe.pictures(number)
        sized = spec.resolve({**values, "prompt_width": 1}, pictures)  # its sizes alone: images are part of the text's width
        steps = values["num_inference_steps"] + (number % 3 if cell.in_flight == STAGGERED else 0)
        natural = cell.width == NATURAL
        widths = {
            "prompt_width": spec.text_tokens(tokenizer, text, sized) if natural else int(cell.width),
            "negative_prompt_width": spec.text_tokens(tokenizer, negative, sized) if natural else int(cell.width),
        }
        result.append(
            RolloutRequest(
                request_id=f"{cell.dtype}-{cell.guidance}-{cell.width}-{cell.in_flight}-{number:02d}",
                prompt=Prompt(text=text, images=pictures),
                spec=spec.resolve({**values, **widths, "num_inference_steps": steps}, pictures),
                seed=sampling.seed + number,
                group_id=f"{cell.dtype}-{cell.guidance}-{cell.width}-{cell.in_flight}",
                member=number,
            )
        )
    return result


def submissions(cell: Cell, whole: Sequence[RolloutRequest]) -> Iterator[list[RolloutRequest]]:
    """The requests in the portions in which they are submitted."""
    size = len(whole) if cell.in_flight == STAGGERED else int(cell.in_flight)
    for start in range(0, len(whole), size):
        yield list(whole[start : start + size])


def renamed(request: RolloutRequest, suffix: str) -> RolloutRequest:
    """The same image asked for again: the engine wants every request id once."""
    return replace(request, request_id=f"{request.request_id}-{suffix}")


def _plain(value: Any) -> Any:
    return value.value if isinstance(value, Enum) else value


def _value(name: str, text: str) -> Any:
    words = text.split(",")
    if len({float(word) if _scale(word) else word for word in words}) < len(words):
        raise UserError(f"{name}={text}: expected each value once")
    if name == "dtype" and set(words) <= {"float32", "bfloat16"}:
        return tuple(words)
    if name == "width" and all(word == NATURAL or _positive(word) for word in words):
        return tuple(words)
    if name == "in_flight" and all(word == STAGGERED or _positive(word) for word in words):
        return tuple(words)
    if name == "images" and _positive(text):
        return int(text)
    if name in ("causes", "compile", "true_width") and text in ("true", "false"):
        return text == "true"
    if name == "guidance" and all(_scale(word) for word in words):
        return tuple(float(word) for word in words)
    raise UserError(f"{name}={text}: {_EXPECTED[name]}")


_EXPECTED = {
    "guidance": "expected numbers of 0 or more, such as guidance=1.0,4.0",
    "dtype": "expected float32, bfloat16 or both",
    "width": f"expected {NATURAL} or numbers of text tokens, such as width={NATURAL},64",
    "in_flight": f"expected {STAGGERED} or numbers of images, such as in_flight=1,8,{STAGGERED}",
    "images": "expected 1 or more, below 2**31",
    "causes": "expected true or false",
    "compile": "expected true or false",
    "true_width": "expected true or false",
}


def _positive(word: str) -> bool:
    return word.isdecimal() and word.isascii() and 0 < int(word[:20]) < 2**31


def _scale(word: str) -> bool:
    try:
        return 0 <= float(word) < math.inf
    except ValueError:
        return False
