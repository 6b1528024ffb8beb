"""Plots as inline SVG, and tables. Colours are the page's own, so that they follow light and dark."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 420, 210, 66, 10, 10, 24  # pixels of a plot, and of its margins
COLOURS = 8  # classes c0 to c7 of the page
BARS = 60  # at most; of more steps each bar is a mean over some

Points = Sequence[tuple[int, float | None]]


@dataclass(frozen=True, kw_only=True)
class Series:
    name: str
    points: Points  # (step, value); None breaks the line
    errors: Mapping[int, float] | None = None  # step -> half the length of its bar
    colour: int = 0
    strong: bool = False


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, text: int = 1) -> str:
    """The first `text` columns are left-aligned; no header where `header` is empty."""

    def line(tag: str, cells: Sequence[str]) -> str:
        return "".join(f"<{tag}{' class=text' if n < text else ''}>{escape(cell)}</{tag}>" for n, cell in enumerate(cells))

    head = f"<tr>{line('th', header)}</tr>" if header else ""
    body = "".join(f"<tr>{line('td', row)}</tr>" for row in rows)
    return f'<div class="scroll"><table>{head}{body}</table></div>'


def sentence(text: str) -> str:
    return f"<p>{escape(text)}</p>"


def line_chart(title: str, series: Sequence[Series], *, unit: str = "") -> str:
    """Lines over steps; empty where nothing is finite."""
    drawn = [one for one in series if any(value is not None for _, value in one.points)]
    if not drawn:
        return ""
    steps = [step for one in drawn for step, _ in one.points]
    spread = [(value, (one.errors or {}).get(step, 0.0)) for one in drawn for step, value in one.points if value is not None]
    low, high = min(value - error for value, error in spread), max(value + error for value, error in spread)
    if low == high:
        low, high = (low - abs(low) / 10, high + abs(high) / 10) if low else (0.0, 1.0)
    scale = _Scale(first=min(steps), last=max(steps), low=low, high=high)
    lines = [_grid(scale, unit), *(_line(one, scale) for one in drawn)]
    legend = _legend([(one.colour, one.name) for one in drawn]) if len(drawn) > 1 else ""
    return _figure(title, lines, legend)


def stacked_bars(title: str, stages: Sequence[str], steps: Sequence[tuple[str, Sequence[float]]], unit: str) -> str:
    """One bar a step (its label first), the stages on top of each other."""
    highest = max((sum(values) for _, values in steps), default=0.0) or 1.0
    scale = _Scale(first=0, last=len(steps), low=0.0, high=highest)
    width = (WIDTH - LEFT - RIGHT) / max(len(steps), 1)
    lines = [_grid(scale, unit, labels=(steps[0][0], steps[-1][0]) if steps else ("", ""))]
    for place, (label, values) in enumerate(steps):
        below = 0.0
        for number, (stage, value) in enumerate(zip(stages, values, strict=True)):
            top, bottom = scale.y(below + value), scale.y(below)
            below += value
            lines.append(
                f'<rect class="f{number % COLOURS}" x="{LEFT + place * width + width * 0.08:.1f}" y="{top:.1f}" '
                f'width="{width * 0.84:.1f}" height="{bottom - top:.1f}"><title>{escape(f"{label}: {stage} {value:.3g}{unit}")}'
                "</title></rect>"
            )
    return _figure(title, lines, _legend(list(enumerate(stages))))


@dataclass(frozen=True, kw_only=True)
class _Scale:
    first: float
    last: float
    low: float
    high: float

    def x(self, step: float) -> float:
        span = self.last - self.first
        return LEFT + (WIDTH - LEFT - RIGHT) * ((step - self.first) / span if span else 0.5)

    def y(self, value: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (value - self.low) / (self.high - self.low)


def _grid(scale: _Scale, unit: str, labels: tuple[str, str] | None = None) -> str:
    parts = []
    for share in (0.0, 0.5, 1.0):
        value = scale.low + share * (scale.high - scale.low)
        y = scale.y(value)
        parts.append(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text x="{LEFT - 5}" y="{y + 4:.1f}" text-anchor="end">{value:.3g}{escape(unit)}</text>'
        )
    first, last = labels or (f"step {scale.first:g}", f"step {scale.last:g}")
    parts.append(f'<text x="{LEFT}" y="{HEIGHT - 6}">{escape(first)}</text>')
    if first != last:
        parts.append(f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 6}" text-anchor="end">{escape(last)}</text>')
    return "".join(parts)


def _line(series: Series, scale: _Scale) -> str:
    pieces: list[list[tuple[int, float]]] = [[]]
    for step, value in series.points:
        if value is None:
            pieces.append([])
        else:
            pieces[-1].append((step, value))
    parts, strong = [], " strong" if series.strong else ""
    for piece in pieces:
        if len(piece) > 1:
            path = " ".join(f"{scale.x(step):.1f},{scale.y(value):.1f}" for step, value in piece)
            parts.append(f'<polyline class="l{series.colour % COLOURS}{strong}" points="{path}"/>')
    points = [point for piece in pieces for point in piece]
    for step, value in points:
        x, error = scale.x(step), (series.errors or {}).get(step, 0.0)
        if error:
            ends = f'y1="{scale.y(value - error):.1f}" y2="{scale.y(value + error):.1f}"'
            parts.append(f'<line class="l{series.colour % COLOURS}" x1="{x:.1f}" x2="{x:.1f}" {ends}/>')
        if len(points) <= BARS:
            spread = f" ± {error:.2g}" if error else ""
            told = escape(f"{series.name}, step {step}: {value:.4g}{spread}")
            parts.append(
                f'<circle class="f{series.colour % COLOURS}" cx="{x:.1f}" cy="{scale.y(value):.1f}" r="3">'
                f"<title>{told}</title></circle>"
            )
    return "".join(parts)


def _legend(names: Sequence[tuple[int, str]]) -> str:
    return " ".join(
        f'<span class="key"><svg width="10" height="10" aria-hidden="true"><rect class="f{colour % COLOURS}" width="10" '
        f'height="10"/></svg> {escape(name)}</span>'
        for colour, name in names
    )


def _figure(title: str, lines: Sequence[str], legend: str) -> str:
    return (
        f'<figure><figcaption>{escape(title)}</figcaption><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(title)}">{"".join(lines)}</svg><div class="legend">{legend}</div></figure>'
    )
