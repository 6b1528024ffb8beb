"""Lines and stacked bars as SVG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 720, 320, 56, 200, 28, 44
COLORS = ("#2471a3", "#c0392b", "#1e8449", "#7d3c98", "#b9770e", "#34495e")
Band = tuple[float, float, float]  # least, median, greatest


def _y(value: float, top: float) -> float:
    return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * value / top


def _frame(title: str, below: str, top: float, unit: str) -> list[str]:
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{LEFT}" y="16" font-weight="bold">{escape(title)}</text>',
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 8}" text-anchor="middle">{escape(below)}</text>',
    ]
    for fifth in range(6):
        level = _y(top * fifth / 5, top)
        parts.append(f'<line x1="{LEFT}" y1="{level:.1f}" x2="{WIDTH - RIGHT}" y2="{level:.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{level + 4:.1f}" text-anchor="end">{top * fifth / 5:g} {unit}</text>')
    return parts


def _legend(names: Sequence[str]) -> list[str]:
    x = WIDTH - RIGHT + 14
    return [
        f'<text x="{x}" y="{TOP + 14 + 18 * number}" fill="{COLORS[number]}">{escape(name)}</text>'
        for number, name in enumerate(names)
    ]


def lines(
    title: str, below: str, ticks: Sequence[str], curves: Mapping[str, Sequence[Band]], top: float = 100, unit: str = "%"
) -> str:
    """Medians, with a shade from least to greatest; the ticks are equally far apart."""
    parts = _frame(title, below, top, unit)
    xs = [LEFT + (WIDTH - LEFT - RIGHT) * (index + 0.5) / len(ticks) for index in range(len(ticks))]
    parts += [
        f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{escape(tick)}</text>'
        for x, tick in zip(xs, ticks, strict=True)
    ]
    for number, bands in enumerate(curves.values()):
        low = [f"{x:.1f},{_y(band[0], top):.1f}" for x, band in zip(xs, bands, strict=True)]
        high = [f"{x:.1f},{_y(band[2], top):.1f}" for x, band in zip(xs, bands, strict=True)]
        middle = [f"{x:.1f},{_y(band[1], top):.1f}" for x, band in zip(xs, bands, strict=True)]
        parts.append(f'<polygon points="{" ".join([*low, *reversed(high)])}" fill="{COLORS[number]}" opacity="0.15"/>')
        parts.append(f'<polyline points="{" ".join(middle)}" fill="none" stroke="{COLORS[number]}" stroke-width="2"/>')
    return "\n".join([*parts, *_legend(list(curves)), "</svg>\n"])


def bars(title: str, below: str, stacks: Mapping[str, Mapping[str, float]], top: float, unit: str) -> str:
    """One bar for each of `stacks`, of the same parts."""
    parts = _frame(title, below, top, unit)
    slot = (WIDTH - LEFT - RIGHT) / len(stacks)
    for index, (label, stack) in enumerate(stacks.items()):
        x, base = LEFT + slot * (index + 0.2), 0.0
        for number, value in enumerate(stack.values()):
            height = _y(base, top) - _y(base + value, top)
            parts.append(
                f'<rect x="{x:.1f}" y="{_y(base + value, top):.1f}" width="{slot * 0.6:.1f}" height="{height:.1f}" '
                f'fill="{COLORS[number]}"/>'
            )
            base += value
        parts.append(f'<text x="{x + slot * 0.3:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{escape(label)}</text>')
    return "\n".join([*parts, *_legend(list(next(iter(stacks.values())))), "</svg>\n"])
