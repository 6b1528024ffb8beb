"""Engine against trainer over a run: one column a step, one row a timestep."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

_COLUMNS = 400  # the latest; more would not be told apart
_CELL, _LEFT, _TOP, _LINE = 12, 34, 30, 12
_EQUAL, _MISSING, _BROKEN = (214, 234, 214), (255, 255, 255), (0, 0, 0)
_FLOOR = 1e-9  # |d| drawn palest; fp32 log-probs near 1 are 1.2e-7 apart


def heat_map(history: Sequence[tuple[int, Mapping[int, float]]], clip_range: float) -> Image.Image:
    """Green is exactly 0; from yellow to red |d| grows to clip_range and above; black is NaN; white was not sampled.

    Raises:
        ValueError: nothing to draw.
    """
    columns = list(history)[-_COLUMNS:]
    rows = sorted({index for _, gaps in columns for index in gaps})
    if not rows:
        raise ValueError("no step with rollout_corr/logprob_abs_diff/ts_*: expected at least one")
    pixels = np.full((len(rows), len(columns), 3), _MISSING, dtype=np.uint8)
    for column, (_, gaps) in enumerate(columns):
        for index, gap in gaps.items():
            pixels[rows.index(index), column] = _colour(gap, clip_range)
    cells = pixels.repeat(_CELL, axis=0).repeat(_CELL, axis=1)
    sheet = Image.new("RGB", (max(_LEFT + cells.shape[1], 330), _TOP + cells.shape[0] + _LINE + 4), "white")
    sheet.paste(Image.fromarray(cells), (_LEFT, _TOP))
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=10)
    draw.text((2, 2), f"|engine - trainer| per log-prob; green: exactly 0, red: {clip_range:g} or more", "black", font)
    draw.text((2, _TOP - _LINE - 2), "step index", "black", font)
    for row, index in enumerate(rows):
        draw.text((4, _TOP + row * _CELL), str(index), "black", font)
    draw.text((_LEFT, _TOP + cells.shape[0] + 2), f"steps {columns[0][0]} to {columns[-1][0]}", "black", font)
    return sheet


def _colour(gap: float, clip_range: float) -> tuple[int, int, int]:
    if gap == 0:
        return _EQUAL
    if not math.isfinite(gap):
        return _BROKEN
    share = math.log(max(gap, _FLOOR) / _FLOOR) / math.log(max(clip_range / _FLOOR, 10.0))
    return 255, round(225 * (1 - min(max(share, 0.0), 1.0))), 0
