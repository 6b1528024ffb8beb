"""The rewards of a run over its steps, as a picture beside its summary."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from omni_rollout.monitor.verdict import HELD_OUT, TRAINED

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 640, 320, 56, 12, 30, 24
_TRAINED, _HELD_OUT, _RULE = (140, 170, 200), (180, 60, 40), (225, 225, 225)
Points = list[tuple[int, float]]


def reward_curve(lines: Sequence[Mapping[str, Any]]) -> Image.Image | None:
    """The mean training reward of each step, and the held-out reward of each evaluation with its standard error.

    Args:
        lines: of metrics.jsonl.

    Returns:
        None: fewer than two figures of either.
    """
    trained, held_out = _points(lines, TRAINED), _points(lines, HELD_OUT)
    if max(len(trained), len(held_out)) < 2:
        return None
    errors = dict(_points(lines, f"{HELD_OUT}_se"))
    values = [value for _, value in trained]
    values += [value + sign * errors.get(step, 0.0) for step, value in held_out for sign in (-1, 1)]
    low, high = min(values), max(values)
    room = (high - low) / 20 or abs(high) / 10 or 1.0
    low, high = low - room, high + room
    first, last = (end(step for step, _ in [*trained, *held_out]) for end in (min, max))

    def place(step: float, value: float) -> tuple[float, float]:
        across, up = (step - first) / max(last - first, 1), (value - low) / (high - low)
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * across, _HEIGHT - _BOTTOM - (_HEIGHT - _TOP - _BOTTOM) * up

    sheet = Image.new("RGB", (_WIDTH, _HEIGHT), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=12)
    for share in (0.0, 0.5, 1.0):
        value = low + share * (high - low)
        _, y = place(first, value)
        draw.line([(_LEFT, y), (_WIDTH - _RIGHT, y)], _RULE)
        draw.text((_LEFT - 6, y), f"{value:.3g}", "black", font, anchor="rm")
    draw.text((_LEFT, _HEIGHT - 6), f"step {first}", "black", font, anchor="ls")
    draw.text((_WIDTH - _RIGHT, _HEIGHT - 6), f"step {last}", "black", font, anchor="rs")
    draw.text((_LEFT, 10), "reward in training: other prompts each step", _TRAINED, font)
    draw.text((_WIDTH - _RIGHT, 10), "held-out: the same images, +- standard error", _HELD_OUT, font, anchor="ra")
    draw.line([place(*point) for point in trained], _TRAINED, width=2)
    draw.line([place(*point) for point in held_out], _HELD_OUT, width=3)
    for step, value in held_out:
        error = errors.get(step, 0.0)
        draw.line([place(step, value - error), place(step, value + error)], _HELD_OUT)
    return sheet


def _points(lines: Sequence[Mapping[str, Any]], key: str) -> Points:
    return [(line["step"], line[key]) for line in lines if line.get(key) is not None and math.isfinite(line[key])]
