"""What was measured, in words, tables and plots; written into docs/performance.md between two lines."""

from __future__ import annotations

import os
import statistics
from collections.abc import Iterator, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from benchmarks.exact import cpu_name
from benchmarks.simulation import plots
from benchmarks.speed.contenders import BATCHED, BY_REQUEST, EXACT, FAST, FLOOR, NAMES, SERIAL, STEPWISE
from benchmarks.speed.widths import KINDS

BEGIN, END = "<!-- make bench: begin -->", "<!-- make bench: end -->"
Results = Mapping[str, Any]


def page(results: Results) -> list[str]:
    """Markdown."""
    loads = [found["load"] for part in results.values() if isinstance(part, list) for found in part if isinstance(found, dict)]
    lines = [
        f"{cpu_name()}, {os.cpu_count()} cores; {date.today().isoformat()}; load average while it ran: "
        f"{min(loads, default=0):.1f} to {max(loads, default=0):.1f} (a contender alone makes 1 to 2; more is other programs).",
        "",
    ]
    for part, write in (
        ("rollout", _rollout),
        ("stages", _stages),
        ("update", _update),
        ("costs", _costs),
        ("widths", _widths),
        ("spread", _spread),
        ("starts", _starts),
    ):
        if results.get(part):
            lines += [*write(results[part]), ""]
    return lines[:-1]


def _rollout(found: Sequence[Results]) -> Iterator[str]:
    yield "**Rollout**: images a second, as multiples of diffusers one by one; medians of rounds."
    yield ""
    names = [name for name in NAMES if name != SERIAL]
    yield f"| shape | in flight | {' | '.join(names)} | exact / batched | exact / floor | exact / better stock |"
    yield f"|{'---|' * (len(names) + 5)}"
    for one in found:
        fast, shape = one["as_fast_as"], one["shape"]
        stock = max((STEPWISE, BY_REQUEST), key=lambda name: fast[SERIAL][name]["median"])
        cells = [f"{fast[SERIAL][name]['median']:.2f}" for name in names]
        against = [_band(fast[other][EXACT]) for other in (BATCHED, FLOOR, stock)]
        yield f"| {shape['name']} | {shape['in_flight']} | {' | '.join([*cells, *against])} |"


def _stages(found: Sequence[Results]) -> Iterator[str]:
    yield "**Where a round goes**: seconds of ours, exact, and of the floor; decoding happens beside the rest."
    yield "The last two are of another round, and within the transformer."
    yield ""
    names = list(dict.fromkeys(name for one in found for name in one["stages"]))
    kernels = list(dict.fromkeys(name for one in found for name in one["kernels"]))
    yield f"| shape | ours | floor | {' | '.join(names)} | what is left | {' | '.join(kernels)} |"
    yield f"|{'---|' * (len(names) + len(kernels) + 4)}"
    for one in found:
        spent, whole = one["stages"], one["seconds"]
        rest = whole[EXACT] - sum(seconds for name, seconds in spent.items() if name != "decode")
        cells = [whole[EXACT], whole[FLOOR], *(spent.get(name, 0.0) for name in names), rest]
        cells += [one["kernels"][name] for name in kernels]
        yield f"| {one['shape']} | {' | '.join(f'{seconds:.3f}' for seconds in cells)} |"


def _update(found: Sequence[Results]) -> Iterator[str]:
    yield "**Update** (as fast as its floor) and **weight sync** (times of a plain copy of the weights)."
    yield ""
    yield "| shape | pairs, micro-batch | update / floor | weights | sync, seconds | sync, in copies |"
    yield "|---|---|---|---|---|---|"
    for one in found:
        sync = statistics.median(one["seconds"]["sync"])
        copies = 1 / one["sync_of_copy"]["median"]
        pairs = f"{one['pairs']}, {one['micro_batch']}"
        yield (
            f"| {one['shape']} | {pairs} | {_band(one['update_of_floor'])} | {one['megabytes']:.1f} MB | {sync:.3f} | "
            f"{copies:.1f} |"
        )


def _costs(found: Sequence[Results]) -> Iterator[str]:
    for one in found:
        yield f"**Costs**, {one['shape']}, exact; medians of rounds:"
        yield ""
        yield "| against | seconds of a round | fit |"
        yield "|---|---|---|"
        for name, sweep in one["sweeps"].items():
            points = ", ".join(f"{value}: {statistics.median(taken):.2f}" for value, taken in sweep["seconds"].items())
            line = f"{sweep['intercept']:.3f} + {sweep['slope']:.4f} x, R2 {sweep['r2']:.4f}" if "r2" in sweep else ""
            what = name if sweep["images"] is None else f"{name} ({sweep['images']} images)"
            yield f"| {what} | {points} | {line} |"
        yield ""
        encoder = one["encoder"]
        yield f"Text encoder: called {encoder['calls']} times for {encoder['images']} images of {encoder['distinct']} prompts."
        yield _memory(one["memory_mb"])


def _memory(held: Sequence[float]) -> str:
    """The second half alone: allocators take what they need in the first."""
    half = held[len(held) // 2 :]
    slope = statistics.linear_regression(range(len(half)), half).slope if len(half) > 1 else 0.0
    return (
        f"Memory over {len(held)} batches: {held[0]:.0f} MB after the first, {half[0]:.0f} half way, {held[-1]:.0f} at last; "
        f"{1000 * slope:+.0f} KB a batch over the second half."
    )


def _widths(found: Sequence[Results]) -> Iterator[str]:
    yield "**Kinds of text width** (`collate.width`), exact: as fast as `fixed`, and the share of text tokens that is padding."
    yield ""
    yield "| shape | guidance | prompts | tokens at most | bucketed | natural | padding: fixed, bucketed, natural |"
    yield "|---|---|---|---|---|---|---|"
    for one in found:
        for prompts, told in one["prompts"].items():
            fast, padding = told["as_fast_as_fixed"], ", ".join(f"{told['padding'][kind]:.0%}" for kind in KINDS)
            cells = [one["shape"], "on" if one["guided"] else "off", prompts, told["width"]]
            yield f"| {' | '.join([*map(str, cells), _band(fast['bucketed']), _band(fast['natural']), padding])} |"


def _spread(found: Sequence[Results]) -> Iterator[str]:
    for one in found:
        base = statistics.median(one["seconds"]["1 thread"])
        parts = [f"{name} {base / statistics.median(taken):.2f}" for name, taken in one["seconds"].items()]
        yield f"**Threads and workers**, {one['shape']}, exact, as fast as one thread: {', '.join(parts)}."


def _starts(found: Sequence[float]) -> Iterator[str]:
    each = ", ".join(f"{seconds:.1f}" for seconds in found)
    yield f"**Start**, from a new process to an engine that may be asked, imports included, nano: {each} s."


def _band(ratio: Mapping[str, float]) -> str:
    return f"{ratio['median']:.2f} ({ratio['least']:.2f} to {ratio['greatest']:.2f})"


def pictures(results: Results) -> Iterator[tuple[str, str]]:
    """File name and SVG of each."""
    found = results.get("rollout") or []
    if found:
        names = [BATCHED, STEPWISE, BY_REQUEST, FLOOR, EXACT, FAST]  # a curve each; there are six colours
        curves = {name: [_triple(one["as_fast_as"][SERIAL][name]) for one in found] for name in names}
        top = max(greatest for bands in curves.values() for *_, greatest in bands)
        ticks = [one["shape"]["name"] for one in found]
        title = "images a second, as multiples of diffusers one by one"
        yield "performance-rollout.svg", plots.lines(title, "", ticks, curves, top=top, unit="x")
    for one in results.get("costs") or []:
        sweep = one["sweeps"]["requests in flight"]
        bands = [
            (sweep["images"] / max(taken), sweep["images"] / statistics.median(taken), sweep["images"] / min(taken))
            for taken in sweep["seconds"].values()
        ]
        title, ticks = f"images a second, {one['shape']}, exact", [str(value) for value in sweep["seconds"]]
        top = max(greatest for *_, greatest in bands)
        yield "performance-in-flight.svg", plots.lines(title, "requests in flight", ticks, {EXACT: bands}, top=top, unit="/s")


def _triple(ratio: Mapping[str, float]) -> tuple[float, float, float]:
    return ratio["least"], ratio["median"], ratio["greatest"]


def write_docs(results: Results, path: Path) -> None:
    """Between the markers; pictures beside the page."""
    drawn = dict(pictures(results))
    for name, svg in drawn.items():
        path.with_name(name).write_text(svg, encoding="utf-8")
    links = [f"![{name.removesuffix('.svg').replace('-', ' ')}]({name})" for name in drawn]
    before, _, rest = path.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    path.write_text("\n".join((before + BEGIN, *page(results), "", *links, END)) + after, encoding="utf-8")
