"""Processes that take turns: each works only while it is asked, so that all meet the same machine, minute by minute."""

from __future__ import annotations

import multiprocessing
import os
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

Make = Callable[..., Any]  # in the child: makes what is asked later


PRELOADED = ["torch", "diffusers", "vllm_omni.diffusion.diffusion_engine"]  # once, for all processes


class TurnError(RuntimeError):
    """A process failed or died; the message says which and why."""


class Process:
    """Another process with one object in it.

    Args:
        make: importable; called there with `arguments`, after torch has its `threads`.
        fresh: one that imports everything by itself, so that its start is a program's.
    """

    def __init__(self, name: str, make: Make, *arguments: Any, threads: int, fresh: bool = False) -> None:
        context: Any = multiprocessing.get_context("spawn" if fresh else "forkserver")
        if not fresh:
            context.set_forkserver_preload(PRELOADED)
        self.name = name
        # What libraries print there; gone with this object.
        self._said = tempfile.NamedTemporaryFile(prefix="speed-", suffix=".log")  # noqa: SIM115
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, self._said.name, make, arguments, threads), name=name)
        self._process.start()
        theirs.close()

    def send(self, method: str, *arguments: Any) -> None:
        self._pipe.send((method, arguments))

    def answer(self) -> tuple[Any, float]:
        """What the call sent last gave, and the seconds it took by that process's own clock. Before any: of its start."""
        try:
            done, value, seconds = self._pipe.recv()
        except EOFError:
            self._process.join(10)
            said = Path(self._said.name).read_text(encoding="utf-8", errors="replace")[-2000:]
            raise TurnError(f"{self.name}: its process ended with status {self._process.exitcode}\n{said}") from None
        if not done:
            raise TurnError(f"{self.name} failed:\n{value}")
        return value, seconds

    def ask(self, method: str, *arguments: Any) -> tuple[Any, float]:
        self.send(method, *arguments)
        return self.answer()

    def close(self) -> None:
        with suppress(OSError):  # it has ended by itself, and `answer` has said so
            self._pipe.send(None)
        self._process.join(60)
        if self._process.is_alive():
            print(f"{self.name} did not end within a minute and is killed", file=sys.stderr)
            self._process.kill()
        self._said.close()


def _serve(pipe: Connection, log: str, make: Make, arguments: Sequence[Any], threads: int) -> None:
    """Answers until it is told None; an engine's start changes the number of threads, so it is set again after."""
    start = time.perf_counter()
    said = os.open(log, os.O_WRONLY)
    os.dup2(said, 1)
    os.dup2(said, 2)
    try:
        import torch

        torch.set_num_threads(threads)
        held = make(*arguments)
        torch.set_num_threads(threads)
        pipe.send((True, None, time.perf_counter() - start))
        while (message := pipe.recv()) is not None:
            method, given = message
            start = time.perf_counter()
            value = getattr(held, method)(*given)
            pipe.send((True, value, time.perf_counter() - start))
        held.close()
    except BaseException:
        pipe.send((False, traceback.format_exc(), 0.0))


@contextmanager
def together(processes: Mapping[str, Process]) -> Iterator[dict[str, float]]:
    """Waits for all; gives name -> seconds of its start; ends them all."""
    try:
        yield {name: process.answer()[1] for name, process in processes.items()}
    finally:
        for process in processes.values():
            process.close()


def rounds(names: Sequence[str], number: int) -> Iterator[tuple[int, list[str]]]:
    """(1, names), (2, ...): every round begins with another one, and every second goes backwards."""
    for turn in range(1, number + 1):
        shift = turn % len(names)
        order = [*names[shift:], *names[:shift]]
        yield turn, order if turn % 2 else order[::-1]


def ratios(seconds: Sequence[float], of: Sequence[float]) -> dict[str, float]:
    """How many times as fast `seconds` are as `of`, round by round: median, least, greatest."""
    found = sorted(b / a for a, b in zip(seconds, of, strict=True))
    return {"median": statistics.median(found), "least": found[0], "greatest": found[-1]}
