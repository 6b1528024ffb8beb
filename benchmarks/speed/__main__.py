"""Everybody who makes images, in turns on one machine; ratios, for a machine's own speed is nobody's merit.

make bench                                       # all of it, and the table of docs/performance.md
python -m benchmarks.speed --quick --docs none   # two minutes: a tiny model, a round
python -m benchmarks.speed --shapes nano-8,long-bf16 --parts rollout --rounds 5 --docs none
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read by processes that are started below
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")

from benchmarks.speed import costs, shapes, stages, tables, training, widths
from benchmarks.speed.contenders import NAMES
from benchmarks.speed.measure import compared
from benchmarks.speed.shapes import Shape

PARTS = ("rollout", "stages", "update", "costs", "widths", "spread", "starts")
TRAINED = ("nano-8", "balanced-g1-fp32", "balanced-g1-bf16", "wide-bf16")  # shapes whose update and sync are measured
WIDE = ("nano-8", "balanced-g4-bf16")  # and whose kinds of text width
WATCHED = "nano-8"  # the shape of all other costs


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmarks.speed", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", type=_chosen(tuple(shapes.SHAPES)), default=tuple(shapes.SHAPES), metavar="A,B")
    parser.add_argument("--parts", type=_chosen(PARTS), default=PARTS, metavar="A,B", help=", ".join(PARTS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of torch, in every contender")
    parser.add_argument("--quick", action="store_true", help="a tiny model and a round, instead of --shapes and --rounds")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write what was measured, as it comes")
    parser.add_argument("--docs", default=str(shapes.ROOT / "docs" / "performance.md"), metavar="FILE", help="none: leave it")
    given = parser.parse_args(arguments)
    if given.rounds < 1 or given.threads < 1:
        parser.error("--rounds and --threads: expected at least 1")
    return given


def _chosen(known: tuple[str, ...]) -> Callable[[str], tuple[str, ...]]:
    def names(text: str) -> tuple[str, ...]:
        if unknown := [name for name in text.split(",") if name not in known]:
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: expected some of {', '.join(known)}")
        return tuple(text.split(","))

    return names


def main(arguments: Sequence[str] | None = None) -> int:
    given = parse(arguments)
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:

        def made(name: str) -> Shape:
            shape = replace(shapes.QUICK if given.quick else shapes.SHAPES[name], threads=given.threads)
            return replace(shape, path=shapes.checkpoint(shape.model, shape.dtype, Path(folder)))

        for part in given.parts:
            for found in _measured(part, given, made):
                results.setdefault(part, []).append(found)
                print(f"{part}: {json.dumps(found)}", file=sys.stderr, flush=True)
                if given.json is not None:
                    given.json.write_text(json.dumps(results), encoding="utf-8")
    print("\n".join(tables.page(results)))
    if given.docs != "none":
        tables.write_docs(results, Path(given.docs))
    return 0


def _measured(part: str, given: argparse.Namespace, made: Callable[[str], Shape]) -> Any:
    """The results of a part, as they come."""
    effort, number = (costs.QUICK, 1) if given.quick else (replace(costs.FULL, rounds=given.rounds), given.rounds)
    names = ["tiny"] if given.quick else list(given.shapes)
    if part == "rollout":
        yield from (compared(made(name), NAMES, number) for name in names)
    elif part == "stages":
        yield from (stages.stages(made(name), number) for name in names)
    elif part == "update":
        chosen = names if given.quick else [name for name in names if name in TRAINED]
        yield from (training.update(made(name), number) for name in chosen)
    elif part == "costs":
        yield costs.costs(made(WATCHED), effort)
    elif part == "widths":
        chosen = names if given.quick else [name for name in names if name in WIDE]
        yield from (widths.widths(made(name), number) for name in chosen)
    elif part == "spread" and not given.quick:
        yield costs.spread(made(WATCHED), number)
    elif part == "starts":
        yield from costs.starts(made(WATCHED), effort.starts)


if __name__ == "__main__":
    sys.exit(main())
