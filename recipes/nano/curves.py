"""Draws the curves of this recipe's README from run folders.

    python recipes/nano/curves.py OUT.svg "label=run_dir[:metric]" ...

`metric` is `evaluation/exact_match` unless given; points without it are left out.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 720, 360, 48, 168, 16, 40
COLORS = ("#c0392b", "#2471a3", "#1e8449", "#7d3c98", "#b9770e", "#34495e")


def points(run_dir: Path, metric: str) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line[metric]) for line in lines if line.get(metric) is not None]


def svg(curves: dict[str, list[tuple[int, float]]]) -> str:
    last = max(step for curve in curves.values() for step, _ in curve)

    def x(step: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * step / last

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * value

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
    ]
    for tenth in range(0, 11, 2):
        level = y(tenth / 10)
        parts.append(f'<line x1="{LEFT}" y1="{level:.1f}" x2="{WIDTH - RIGHT}" y2="{level:.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{level + 4:.1f}" text-anchor="end">{tenth * 10} %</text>')
    for step in range(0, last + 1, max(20, last // 8 // 20 * 20)):
        parts.append(f'<text x="{x(step):.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{step}</text>')
    parts.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 6}" text-anchor="middle">step</text>')
    for number, (label, curve) in enumerate(curves.items()):
        color = COLORS[number % len(COLORS)]
        path = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in curve)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="2"/>')
        parts += [f'<circle cx="{x(step):.1f}" cy="{y(value):.1f}" r="3" fill="{color}"/>' for step, value in curve]
        parts.append(f'<text x="{WIDTH - RIGHT + 12}" y="{TOP + 14 + 18 * number}" fill="{color}">{label}</text>')
    return "\n".join([*parts, "</svg>\n"])


def main(arguments: list[str]) -> None:
    out, *named = arguments
    curves = {}
    for item in named:
        label, _, source = item.partition("=")
        run_dir, _, metric = source.partition(":")
        curves[label] = points(Path(run_dir), metric or "evaluation/exact_match")
    Path(out).write_text(svg(curves))


if __name__ == "__main__":
    main(sys.argv[1:])
