"""A report as one HTML page that needs nothing from the network: tables, and plots as inline SVG."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from omni_rollout.parity.attribution import CauseResult
from omni_rollout.parity.measure import Measure
from omni_rollout.parity.report import cell_label, ranked, several_models, verdict
from omni_rollout.parity.results import CellResult, Report

WIDTH, BAR, LABEL = 760, 18, 190  # pixels: of a plot, of a bar with its gap, of the text before it
FLOOR = 1e-10  # nothing smaller is drawn; fp32 log-probs of size 1 resolve 1e-7
STYLE = """
body{font:14px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:60rem;padding:0 1rem;color:#1a1a1a;background:#fff}
table{border-collapse:collapse;margin:.5rem 0 2rem;font-variant-numeric:tabular-nums}
td,th{padding:.15rem .6rem;text-align:right;border-bottom:1px solid #ddd}td.text,th.text{text-align:left}
tr.bad{background:#fde2e2}.verdict{font-size:1.2rem;font-weight:600;padding:.6rem 1rem;border-radius:6px}
.good{background:#e2f5e6}.bad.verdict{background:#fde2e2}svg text{font:12px system-ui,sans-serif;fill:#1a1a1a}
"""


def write_html(report: Report, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(to_html(report), encoding="utf-8")


def to_html(report: Report) -> str:
    kind = "good" if report.exact else "bad"
    parts = [
        f"<!doctype html><html lang=en><meta charset=utf-8><title>Parity of {escape(report.model)}</title>",
        f"<style>{STYLE}</style><h1>Rollout against trainer</h1>",
        f"<p>{escape(report.model)}, parity profile {escape(report.parity)}, clip_range {report.clip_range:g}</p>",
        f'<p class="verdict {kind}">{escape(verdict(report))}</p>',
        _findings(report),
        "<h2>Cells</h2>",
        _cells(report.cells),
        "<h2>Gap per denoising step</h2><p>Largest |d| of all cells of a dtype, by step index.</p>",
        _steps(report.cells),
    ]
    if report.causes:
        parts += [
            "<h2>What each broken rule would cost</h2>",
            "<p>Mean |d| of log-probs (per element) when the trainer breaks this one rule; logarithmic.</p>",
            *(_bars(heading, found) for heading, found in _by_dtype(ranked(report.causes))),
            _causes(ranked(report.causes)),
        ]
    rows = [[key, str(value)] for key, value in report.environment.items()]
    parts += ["<h2>Where this ran</h2>", _table(["", ""], rows, text=2)]
    return "\n".join(parts) + "\n"


def _findings(report: Report) -> str:
    rows = [[dtype, finding.where, finding.name, finding.what] for dtype, finding in report.findings]
    for result in report.cells:
        label = cell_label(result)
        rows += [[label, "engine", "", error] for error in result.errors]
        rows += [[label, finding.where, finding.name, finding.what] for finding in result.findings]
    return "<h2>First differences</h2>" + _table(["", "where", "name", "what"], rows, text=4) if rows else ""


def _cells(results: Sequence[CellResult]) -> str:
    header = ["model", "dtype", "guidance", "width", "in flight", "batches", *_NUMBERS]
    rows = [
        [
            result.model,
            result.cell.dtype,
            f"{result.cell.guidance:g}",
            result.cell.width,
            result.cell.in_flight,
            ", ".join(map(str, result.batch_sizes)),
            *_numbers(result.measure),
        ]
        for result in results
    ]
    return _table(header, rows, text=2, bad=[not result.exact for result in results])


def _causes(results: Sequence[CauseResult]) -> str:
    header = ["model", "dtype", "cause", "what is broken", "settled by", *_NUMBERS, "added to those before: mean |d|"]
    rows = [
        [
            result.model,
            result.dtype,
            result.cause.name,
            f"{result.cause.breaks} (not run: {result.not_run})" if result.not_run else result.cause.breaks,
            result.cause.settled_by,
            *_numbers(result.alone),
            f"{result.cumulative.mean_abs_diff:.2e}" if result.cumulative else "",
        ]
        for result in results
    ]
    return _table(header, rows, text=5)


_NUMBERS = ("log-probs", "KL", "KL nats", "KL/clip", "clipped", "equal bits", "mean |d|", "max |d|")


def _numbers(found: Measure | None) -> list[str]:
    if found is None:
        return [""] * len(_NUMBERS)
    return [
        str(found.log_probs),
        f"{found.kl:.3g}",
        f"{found.kl_nats:.3g}",
        f"{found.kl_over_clip:.3g}",
        f"{found.clip_fraction:.1%}",
        f"{found.bitwise_equal_fraction:.1%}",
        f"{found.mean_abs_diff:.3g}",
        f"{found.max_abs_diff:.3g}",
    ]


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], *, text: int, bad: Sequence[bool] = ()) -> str:
    """The first `text` columns are left-aligned."""

    def line(tag: str, cells: Sequence[str], wrong: bool = False) -> str:
        inside = "".join(
            f"<{tag}{' class=text' if number < text else ''}>{escape(cell)}</{tag}>" for number, cell in enumerate(cells)
        )
        return f"<tr{' class=bad' if wrong else ''}>{inside}</tr>"

    marks = bad or [False] * len(rows)
    body = "\n".join(line("td", row, wrong) for row, wrong in zip(rows, marks, strict=True))
    return f"<table>{line('th', header)}\n{body}</table>"


def _length(value: float, largest: float) -> float:
    """0 to 1 on a logarithmic axis from FLOOR to `largest`."""
    if not value > FLOOR:
        return 0.0
    return math.log(value / FLOOR) / math.log(max(largest, 10 * FLOOR) / FLOOR)


def _bars(heading: str, results: Sequence[CauseResult]) -> str:
    measured = [result for result in results if result.alone is not None]
    largest = max((result.size for result in measured), default=FLOOR)
    space = WIDTH - LABEL - 90
    lines = []
    for number, result in enumerate(measured):
        y, length = number * BAR, space * _length(result.size, largest)
        value = f"{result.size:.2e}" if result.size > 0 else "0 exactly"
        lines.append(
            f'<text x="{LABEL - 6}" y="{y + 13}" text-anchor="end">{escape(result.cause.name)}</text>'
            f'<rect x="{LABEL}" y="{y + 3}" width="{length:.1f}" height="{BAR - 5}" fill="#4a7ab5"/>'
            f'<text x="{LABEL + length + 6:.1f}" y="{y + 13}">{value}</text>'
        )
    return f"<h3>{escape(heading)}</h3>{_svg(len(measured) * BAR, lines)}"


def _steps(results: Sequence[CellResult]) -> str:
    dtypes = list(dict.fromkeys(result.cell.dtype for result in results))
    worst = {dtype: _worst(result for result in results if result.cell.dtype == dtype) for dtype in dtypes}
    largest = max((value for steps in worst.values() for value in steps.values()), default=0.0)
    parts = []
    for dtype, steps in worst.items():
        lines = []
        for position, (step, value) in enumerate(sorted(steps.items())):
            x, height = LABEL + position * 44, 80 * _length(value, largest)
            lines.append(
                f'<rect x="{x}" y="{90 - height:.1f}" width="30" height="{height + 1:.1f}" fill="#4a7ab5"/>'
                f'<text x="{x + 15}" y="106" text-anchor="middle">{step}</text>'
                f'<text x="{x + 15}" y="{84 - height:.1f}" text-anchor="middle">{value:.0e}</text>'
            )
        lines.append(f'<text x="{LABEL - 6}" y="90" text-anchor="end">{escape(dtype)}</text>')
        parts.append(_svg(112, lines))
    return "\n".join(parts)


def _worst(results: Iterable[CellResult]) -> dict[int, float]:
    worst: dict[int, float] = {}
    for result in results:
        for step, found in result.steps.items():
            worst[step] = max(worst.get(step, 0.0), found.max_abs_diff)
    return worst


def _by_dtype(results: Sequence[CauseResult]) -> list[tuple[str, list[CauseResult]]]:
    named = several_models(results)
    found: dict[str, list[CauseResult]] = {}
    for result in results:
        found.setdefault(f"{result.model}, {result.dtype}" if named else result.dtype, []).append(result)
    return list(found.items())


def _svg(height: int, lines: Sequence[str]) -> str:
    return f'<svg viewBox="0 -10 {WIDTH} {height + 10}" width="{WIDTH}" role="img">{"".join(lines)}</svg>'
