"""What a command that takes a while shows on stderr: a bar on a terminal, elsewhere a line every few seconds."""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

from huggingface_hub.utils import disable_progress_bars
from rich.console import Console
from rich.progress import BarColumn, ProgressColumn, SpinnerColumn, Task, TextColumn
from rich.progress import Progress as Bar
from rich.text import Text

VERBOSE = "OMNI_ROLLOUT_VERBOSE"
SILENCE = 3.5  # seconds after which a line is due where there is no terminal
_LOOK = 0.5  # seconds between looks at what a stage counts
_T = TypeVar("_T")


class Progress:
    """One stage after another, each with its count and the time left; a context manager.

    Args:
        shown: False: nothing is shown, for callers that are no command.
    """

    def __init__(self, *, shown: bool = True) -> None:
        self._shown = shown
        console = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)
        self._live = shown and sys.stderr.isatty() and console.is_interactive
        columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(bar_width=20), _Counts())
        # stdout stays what it is: results belong there, and may be piped.
        self._bar = Bar(*columns, console=console, disable=not self._live, transient=True, redirect_stdout=False)
        self._count: Callable[[], float] | None = None
        self._said = 0.0
        self._lock = threading.RLock()  # between the command and the thread that looks after it
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="progress", daemon=True)

    def __enter__(self) -> Progress:
        if self._shown:
            self._bar.start()
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends what is shown; a command does so before it prints its report. May be called twice."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()
        self._bar.stop()

    def say(self, text: str) -> None:
        """A line of its own, at once."""
        if self._shown:
            with self._lock:
                self._bar.console.print(text)
                self._said = time.monotonic()

    def result(self, text: str, style: str | None = None) -> None:
        """A line of the command's own, on stdout."""
        with self._lock:
            if self._live and sys.stdout.isatty():  # the bar stands on the same terminal, and must make room
                self._bar.console.print(text, style=style)
            else:
                print(text, flush=True)
            self._said = time.monotonic()

    def stage(
        self,
        text: str,
        total: int | None = None,
        unit: str = "",
        *,
        count: Callable[[], float] | None = None,
        quiet: bool = False,
    ) -> None:
        """The next thing to be done, in place of the one before.

        Args:
            total: how many `unit`s it has; None: it cannot be told.
            count: how many are done, asked now and then from another thread; without it, `advance` counts.
            quiet: without a terminal nothing is said of it before it has taken a while.
        """
        with self._lock:
            for task in self._bar.task_ids:
                self._bar.remove_task(task)
            self._count = count
            self._bar.add_task(text, total=total, unit=unit)
            if not self._live and not quiet:
                self.say(f"{text} ..." if total is None else f"{text}: {total} {unit}")

    def describe(self, text: str) -> None:
        """Other words for the stage, with its count as it is."""
        with self._lock:
            for task in self._bar.task_ids:
                self._bar.update(task, description=text)

    def advance(self, number: int = 1) -> None:
        with self._lock:
            for task in self._bar.task_ids:
                self._bar.advance(task, number)

    def track(self, items: Iterable[_T]) -> Iterator[_T]:
        """The items, each counted when the next is asked for."""
        for item in items:
            yield item
            self.advance()

    def _watch(self) -> None:
        while not self._ended.wait(_LOOK):
            with self._lock:
                for task in self._bar.tasks:
                    if self._count is not None:
                        self._bar.update(task.id, completed=self._count())
                    if not self._live and time.monotonic() - self._said > SILENCE:
                        self.say(f"{task.description}: {_counts(task)}")


class _Counts(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(_counts(task))


def _counts(task: Task) -> str:
    """`120/900 steps, 0:00:03, 0:00:12 left`; of a stage that cannot be counted, the time it has taken."""
    parts = [] if task.total is None else [f"{task.completed:.0f}/{task.total:.0f} {task.fields['unit']}"]
    parts.append(_time(task.elapsed or 0))
    if task.time_remaining:
        parts.append(f"{_time(task.time_remaining)} left")
    return ", ".join(parts)


def _time(seconds: float) -> str:
    return str(timedelta(seconds=int(seconds)))


@contextmanager
def progress_of(model: str, first: str) -> Iterator[Progress]:
    """For a command with a model: its first stage is shown at once, and the libraries are quiet."""
    quieten_libraries(model)
    with Progress() as progress:
        progress.stage(first)
        yield progress


def quieten_libraries(model: str) -> None:
    """Leaves of the libraries' lines only errors, in this process. Before they are imported; what the environment sets wins.

    OMNI_ROLLOUT_VERBOSE=1 leaves all.
    """
    if os.environ.get(VERBOSE) == "1":
        return
    os.environ.setdefault("WANDB_SILENT", "true")  # which its own settings leave some lines of
    for name in ("TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY"):
        os.environ.setdefault(name, "error")
    if os.path.isdir(model):  # one of the hub may have to be downloaded, which is worth a bar
        disable_progress_bars()  # transformers' own as well
    logging.getLogger("DeepSpeed").addFilter(_is_an_error)  # its import sets the level, and has a handler that writes to stdout
    if os.environ.get("VLLM_CONFIGURE_LOGGING", "0") == "0":
        for name in ("vllm", "vllm_omni"):
            logging.getLogger(name).setLevel(logging.ERROR)


def _is_an_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR
