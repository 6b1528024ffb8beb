"""What a rollout costs against one thing at a time; what must not grow; what is counted."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.speed.contenders import EXACT, Ours, make, requests
from benchmarks.speed.shapes import Shape
from benchmarks.speed.turns import Process, rounds, together

FIELDS = {
    "requests in flight": "in_flight",
    "images": "images",
    "steps": "steps",
    "text width": "prompt_width",
    "pixels": "pixels",
}
UNSEEN = 110  # a round that has prompts of its own: caches hold none of them
LINEAR = ("images", "steps")  # in which the cost must be


@dataclass(frozen=True, kw_only=True)
class Effort:
    """How much is measured."""

    rounds: int
    sweeps: Mapping[str, Sequence[int]]  # of FIELDS -> values, one at a time
    batches: int  # over which memory is watched
    starts: int


FULL = Effort(
    rounds=3,
    sweeps={
        "requests in flight": (1, 2, 4, 8, 16, 32, 64),
        "images": (16, 32, 48, 64),
        "steps": (5, 10, 20, 30),
        "text width": (16, 32, 64, 128),
        "pixels": (32, 64, 96, 128),
    },
    batches=200,
    starts=3,
)
QUICK = Effort(rounds=1, sweeps={"requests in flight": (1, 2), "images": (2, 4, 6), "steps": (2, 4, 6)}, batches=6, starts=0)


class Sweeper(Ours):
    """Our engine, whose limits change between calls."""

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape, "exact")

    def changed(self, number: int, changes: dict[str, int]) -> None:
        """A round of the shape with `changes`; other requests in flight than the engine was made for are fewer."""
        shape = replace(self.shape, **changes)
        self.engine.max_num_seqs = shape.in_flight
        assert sum(1 for _ in self.engine.generate(requests(shape, number))) == shape.images

    def memory(self, batches: int) -> list[float]:
        """MB that the process holds after each of as many batches."""
        import psutil

        process, shape = psutil.Process(), replace(self.shape, images=self.shape.in_flight, steps=2)
        held = []
        for number in range(batches):
            assert sum(1 for _ in self.engine.generate(requests(shape, 1000 + number))) == shape.images
            held.append(process.memory_info().rss / 1e6)
        return held

    def encoder_calls(self, number: int) -> dict[str, int]:
        """Of the text encoder in a round, and the distinct prompts that it had; the negative one is known from before."""
        calls: list[int] = []
        hook = self.engine.pipeline.text_encoder.register_forward_hook(lambda *_: calls.append(1))
        try:
            asked = requests(self.shape, number)
            assert sum(1 for _ in self.engine.generate(asked)) == len(asked)
        finally:
            hook.remove()
        return {"calls": len(calls), "distinct": len({request.prompt.text for request in asked}), "images": len(asked)}


def costs(shape: Shape, effort: Effort) -> dict[str, Any]:
    """Everything that one engine can tell."""
    most = max(effort.sweeps["requests in flight"])
    process = Process("costs", Sweeper, replace(shape, in_flight=most), threads=shape.threads)
    found: dict[str, Any] = {"shape": shape.name, "sweeps": {}}
    with together({"costs": process}):
        process.ask("round", 0)
        for name, values in effort.sweeps.items():
            found["sweeps"][name] = _sweep(process, shape, name, values, effort.rounds)
        found["encoder"] = process.ask("encoder_calls", UNSEEN)[0]
        found["memory_mb"] = process.ask("memory", effort.batches)[0]
    found["load"] = os.getloadavg()[0]
    return found


def _sweep(process: Process, shape: Shape, name: str, values: Sequence[int], number: int) -> dict[str, Any]:
    """Seconds of a round at each value; turns, so that a slow minute touches all."""
    images = {"images": max(values)} if name == "requests in flight" else {}
    seconds: dict[int, list[float]] = {value: [] for value in values}
    for value in values:  # not counted
        process.ask("changed", 0, {"images": min(value, shape.images), FIELDS[name]: value})
    for turn, order in rounds([str(value) for value in values], number):
        for value in map(int, order):
            seconds[value].append(process.ask("changed", turn, {**images, FIELDS[name]: value})[1])
    points = {value: statistics.median(taken) for value, taken in seconds.items()}
    return {"seconds": seconds, "images": images.get("images"), **(fit(points) if name in LINEAR else {})}


def fit(points: Mapping[int, float]) -> dict[str, float]:
    """Least squares of a line: seconds at nothing, seconds for one more, and R2."""
    xs, ys = list(points), list(points.values())
    line = statistics.linear_regression(xs, ys)
    return {"intercept": line.intercept, "slope": line.slope, "r2": statistics.correlation(xs, ys) ** 2}


def spread(shape: Shape, number: int) -> dict[str, Any]:
    """One engine with one thread, one with two, and two with one each and half of the images."""
    halves = replace(shape, images=shape.images // 2)
    processes = {
        "1 thread": Process("1 thread", make, EXACT, shape, threads=1),
        "2 threads": Process("2 threads", make, EXACT, shape, threads=2),
        "first": Process("first worker", make, EXACT, halves, threads=1),
        "second": Process("second worker", make, EXACT, halves, threads=1),
    }
    names = ("1 thread", "2 threads", "2 workers, 1 thread each")
    seconds: dict[str, list[float]] = {name: [] for name in names}
    with together(processes):
        for process in processes.values():
            process.ask("round", 0)
        for turn, order in rounds(names, number):
            for name in order:
                working = [processes[name]] if name in processes else [processes["first"], processes["second"]]
                start = time.perf_counter()
                for process in working:
                    process.send("round", turn)
                for process in working:
                    process.answer()
                seconds[name].append(time.perf_counter() - start)
    return {"shape": shape.name, "seconds": seconds, "load": os.getloadavg()[0]}


def starts(shape: Shape, number: int) -> list[float]:
    """Seconds from nothing to an engine that is loaded, warm and has passed its self-check, imports included."""
    found = []
    for _ in range(number):
        start = time.perf_counter()
        process = Process("start", make, EXACT, shape, threads=shape.threads, fresh=True)
        with together({"start": process}):
            found.append(time.perf_counter() - start)
    return found
