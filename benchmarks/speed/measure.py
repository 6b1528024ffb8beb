"""Runs contenders against each other, shape by shape."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from benchmarks.speed import contenders
from benchmarks.speed.shapes import Shape
from benchmarks.speed.turns import Process, ratios, rounds, together


def compared(shape: Shape, names: Sequence[str], number: int) -> dict[str, Any]:
    """Every contender's seconds, round by round, and how many times as fast it is as those it is compared with."""
    processes = {name: Process(name, contenders.make, name, shape, threads=shape.threads) for name in names}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    with together(processes) as started:
        for process in processes.values():  # not counted
            process.ask("round", 0)
        for turn, order in rounds(names, number):
            for name in order:
                seconds[name].append(processes[name].ask("round", turn)[1])
    return {
        "shape": {name: value for name, value in vars(shape).items() if name != "path"},
        "load": os.getloadavg()[0],
        "start_s": started,
        "seconds": seconds,
        "images_per_s": {name: shape.images / sorted(taken)[len(taken) // 2] for name, taken in seconds.items()},
        "as_fast_as": {other: {name: ratios(taken, seconds[other]) for name, taken in seconds.items()} for other in names},
    }
