"""A report as JSON and as tables on the terminal."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from omni_rollout.parity.attribution import CauseResult
from omni_rollout.parity.matrix import NATURAL
from omni_rollout.parity.measure import Measure
from omni_rollout.parity.results import CellResult, Report


def to_json(report: Report) -> dict[str, Any]:
    """Numbers that are not finite become null; a cell without a single image has null for all of them."""
    return {
        "model": report.model,
        "parity": report.parity,
        "clip_range": report.clip_range,
        "exact": report.exact,
        "environment": report.environment,
        "cells": [_cell(result) for result in report.cells],
        "findings": [{"dtype": dtype, **asdict(finding)} for dtype, finding in report.findings],
        "baselines": {dtype: numbers(measured) for dtype, measured in report.baselines.items()},
        "causes": [_cause(result) for result in ranked(report.causes)],
    }


def write_json(value: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def ranked(causes: Iterable[CauseResult]) -> list[CauseResult]:
    """By model, in the order in which they were measured, and dtype; the largest contribution first."""
    found = list(causes)
    models = list(dict.fromkeys(result.model for result in found))
    return sorted(found, key=lambda result: (models.index(result.model), result.dtype != "float32", result.dtype, -result.size))


def several_models(results: Iterable[CellResult | CauseResult]) -> bool:
    return len({result.model for result in results}) > 1


def numbers(measured: Measure | None) -> dict[str, float | int | None]:
    names = Measure.__dataclass_fields__
    if measured is None:
        return dict.fromkeys(names)
    return {name: value if math.isfinite(value) else None for name, value in asdict(measured).items()}


def print_report(report: Report, console: Console) -> None:
    console.print(_cells_table(report.cells, report.clip_range))
    if report.causes:
        console.print(_causes_table(ranked(report.causes)))
    for dtype, finding in report.findings:
        console.print(f"first difference, {dtype}: {finding.where} {finding.name}: {finding.what}", style="bold", markup=False)
    for result in report.cells:
        for problem in (*result.errors, *(f"{f.where} {f.name}: {f.what}" for f in result.findings)):
            console.print(f"{cell_label(result)}: {problem}", style="bold", markup=False)
    console.print(verdict(report), style="bold", markup=False)


def verdict(report: Report) -> str:
    failed = sum(not result.exact for result in report.cells)
    compared = sum(result.measure.log_probs for result in report.cells if result.measure is not None)
    if report.exact:
        return f"KL is exactly 0 in all {len(report.cells)} cells: {compared} log-probs, 100 % with the same bits"
    return (
        f"{failed} of {len(report.cells)} cells are not exact, {len(report.findings)} findings; {compared} log-probs compared"
    )


def _cells_table(results: Iterable[CellResult], clip_range: float) -> Table:
    results = list(results)
    table = Table(title=f"rollout against recomputation, frozen weights, clip_range {clip_range:g}")
    named = several_models(results)
    for name in (*["model"] * named, "dtype", "guidance", "width", "in flight", "batches", "log-probs"):
        table.add_column(name)
    for name in ("KL", "KL nats", "KL/clip", "clipped", "equal bits", "max |d|"):
        table.add_column(name, justify="right")
    for result in results:
        cell, found = result.cell, result.measure
        batches = ",".join(map(str, result.batch_sizes))
        row = [*[result.model] * named, cell.dtype, f"{cell.guidance:g}", cell.width, cell.in_flight, batches]
        row += [str(found.log_probs), *_columns(found), f"{found.max_abs_diff:.3g}"] if found else ["no image"]
        table.add_row(*row, style="" if result.exact else "red")
    return table


def _causes_table(results: Iterable[CauseResult]) -> Table:
    results = list(results)
    named = several_models(results)
    table = Table(title="what each broken rule would cost, ranked by the mean gap; added: with all before it in docs/parity.md")
    for name in (*["model"] * named, "dtype", "cause", "what is broken"):
        table.add_column(name)
    for name in ("mean |d|", "KL", "KL nats", "KL/clip", "clipped", "equal bits", "added: mean |d|"):
        table.add_column(name, justify="right")
    for result in results:
        row = [*[result.model] * named, result.dtype, result.cause.name, result.cause.breaks]
        if result.alone is None:
            row[-1] += f" (not run: {result.not_run})"
        else:
            added = f"{result.cumulative.mean_abs_diff:.2e}" if result.cumulative else "-"
            row += [f"{result.alone.mean_abs_diff:.2e}", *_columns(result.alone), added]
        table.add_row(*row)
    return table


def _columns(found: Measure) -> list[str]:
    return [
        f"{found.kl:.2e}" if found.kl else "0",
        f"{found.kl_nats:.2e}" if found.kl_nats else "0",
        f"{found.kl_over_clip:.2g}",
        f"{found.clip_fraction:.1%}",
        f"{found.bitwise_equal_fraction:.1%}",
    ]


def cell_label(result: CellResult) -> str:
    cell = result.cell
    return f"{result.model}: {cell.dtype}, guidance {cell.guidance:g}, width {cell.width}, in flight {cell.in_flight}"


def _cell(result: CellResult) -> dict[str, Any]:
    cell = result.cell
    return {
        "model": result.model,
        "dtype": cell.dtype,
        "true_cfg_scale": cell.guidance,
        "prompt_width": cell.width if cell.width == NATURAL else int(cell.width),
        "in_flight": int(cell.in_flight) if cell.in_flight.isdecimal() else cell.in_flight,
        **numbers(result.measure),
        "exact": result.exact,
        "widths": list(result.widths),
        "batch_sizes": list(result.batch_sizes),
        "errors": list(result.errors),
        "findings": [asdict(finding) for finding in result.findings],
        "steps": [{"step_index": step, **numbers(found)} for step, found in result.steps.items()],
    }


def _cause(result: CauseResult) -> dict[str, Any]:
    return {
        "model": result.model,
        "name": result.cause.name,
        "dtype": result.dtype,
        "breaks": result.cause.breaks,
        "settled_by": result.cause.settled_by,
        **numbers(result.alone),
        "cumulative": numbers(result.cumulative) if result.cumulative is not None else None,
        "not_run": result.not_run,
    }
