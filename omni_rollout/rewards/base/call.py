"""Calls a reward, whatever it is and whatever it does: plain or async, slow, raising, answering with what is no number."""

from __future__ import annotations

import asyncio
import inspect
import math
import sys
import threading
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future
from functools import partial
from numbers import Real
from typing import Any

import numpy as np

from omni_rollout.rewards.base.contract import Reward, texts_and_columns
from omni_rollout.types import Prompt

_LONGEST = 300  # characters of an error that are shown


def scores(
    name: str, reward: Reward, images: Sequence[np.ndarray], prompts: Sequence[Prompt], timeout: float
) -> tuple[list[float | None], list[str]]:
    """One number an image, None where there is none, and for each of those a sentence that says why.

    A reward that raises, or gives another number of scores than there are images, is asked once more for every image alone: so
    one image alone is lost to what one image causes.
    """
    if not images:
        return [], []
    try:
        found = _one_each(_ask(reward, images, prompts, timeout), len(images))
    except _LateError as error:
        found = [error] * len(images)
    except Exception as error:
        found = [error] if len(images) == 1 else _alone(reward, images, prompts, timeout)
    values = [value if isinstance(value, float) else None for value in found]
    failures = [
        f"{name}: prompt {prompt.text[:60]!r}: {reason(value)}"
        for prompt, value in zip(prompts, found, strict=True)
        if not isinstance(value, float)
    ]
    return values, failures


class _LateError(Exception):
    pass


def within(seconds: float, function: Callable[..., Any], *arguments: Any) -> Any:
    """What the function, or the coroutine it gives, returns. It runs in a thread of its own, which is left behind when it is
    late: Python cannot end a thread.

    Raises:
        TimeoutError: it took longer; or what the function raised.
    """
    result: Future[Any] = Future()
    compute_as_here = threads_of_here()

    def run() -> None:
        compute_as_here()
        try:
            value = function(*arguments)
            result.set_result(asyncio.run(_awaited(value)) if inspect.isawaitable(value) else value)
        except SystemExit as error:  # would end the run without a word
            result.set_exception(RuntimeError(f"it called sys.exit({error.code!r})"))
        except BaseException as error:
            result.set_exception(error)

    threading.Thread(target=run, daemon=True, name="reward").start()
    try:
        return result.result(seconds)
    except TimeoutError:
        if result.done():  # the function's own
            raise
        raise _LateError(f"no answer within reward.timeout={seconds:g} s") from None


def threads_of_here() -> Callable[[], None]:
    """To be called first in a thread that is started here: torch gives a new one the number that any other was last given."""
    torch = sys.modules.get("torch")  # where nobody has imported it, nobody has given a number
    return partial(torch.set_num_threads, torch.get_num_threads()) if torch is not None else lambda: None


async def _awaited(value: Awaitable[Any]) -> Any:
    return await value


def _ask(reward: Reward, images: Sequence[np.ndarray], prompts: Sequence[Prompt], timeout: float) -> Any:
    return within(timeout, reward, list(images), *texts_and_columns(prompts))


def _alone(reward: Reward, images: Sequence[np.ndarray], prompts: Sequence[Prompt], timeout: float) -> list[float | Exception]:
    found: list[float | Exception] = []
    for image, prompt in zip(images, prompts, strict=True):
        try:
            found += _one_each(_ask(reward, [image], [prompt], timeout), 1)
        except _LateError as error:
            return found + [error] * (len(images) - len(found))
        except Exception as error:
            found.append(error)
    return found


def _one_each(answer: Any, images: int) -> list[float | Exception]:
    values = answer.tolist() if hasattr(answer, "tolist") else answer  # an array, or a tensor
    if not isinstance(values, list | tuple) or len(values) != images:
        what = f"{len(values)} scores" if isinstance(values, list | tuple) else type(answer).__name__
        raise ValueError(f"gave {what} for {images} images; expected a list with one number, or None, an image")
    return [_number(value) for value in values]


def _number(value: Any) -> float | Exception:
    if isinstance(value, Exception):
        return value
    if hasattr(value, "item"):  # of an array, or a tensor, of one number
        value = value.item()
    if not isinstance(value, Real):
        return ValueError(f"gave {value!r:.60}, expected a number")
    return float(value) if math.isfinite(value) else ValueError(f"gave {float(value)}, expected a finite number")


def reason(error: float | Exception) -> str:
    """One line that a terminal can be shown, whatever somebody else's reward or server has put into its error."""
    line = " ".join(str(error).split()) or type(error).__name__
    text = "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in line[:_LONGEST])
    text += f"... ({len(line)} characters)" if len(line) > _LONGEST else ""
    return text if isinstance(error, _LateError | ValueError | RuntimeError) else f"{type(error).__name__}: {text}"
