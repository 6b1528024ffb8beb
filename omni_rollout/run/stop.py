"""How a run is asked to end: a file in its folder, which a signal makes, or anybody who can write there.

The loop looks for it after each step, in whichever process the loop is; so one way serves every back end and every machine.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopFlag:
    """`run_dir/stop`: when it is there, the run ends after the step it is in, with a checkpoint."""

    def __init__(self, run_dir: str | Path) -> None:
        self.path = Path(run_dir) / "stop"
        self._stepping = Path(run_dir) / ".stepping"  # for the process that gets the signal, which may not be the loop's

    @property
    def is_set(self) -> bool:
        return self.path.exists()

    def clear(self) -> None:
        """At the start of a run, for a flag is meant for the run that it stopped."""
        self.path.unlink(missing_ok=True)
        self._stepping.unlink(missing_ok=True)

    def stepping(self) -> None:
        """From now on there is something to lose: a signal waits for the end of the step."""
        self._stepping.touch()

    def idle(self) -> None:
        """There is nothing to lose any more."""
        self._stepping.unlink(missing_ok=True)
        self.listen()

    @contextmanager
    def signals(self) -> Iterator[None]:
        """Inside, SIGTERM and SIGINT set the flag; before the first step, and for a second SIGINT, the process ends at once.

        Raises:
            KeyboardInterrupt, SystemExit: as said, with SIGINT, and with SIGTERM (exit status 143).
        """
        before = [signal.getsignal(number) for number in SIGNALS]
        self.listen()
        try:
            yield
        finally:
            self._stepping.unlink(missing_ok=True)
            if threading.current_thread() is threading.main_thread():
                for number, handler in zip(SIGNALS, before, strict=True):
                    signal.signal(number, handler)

    def listen(self) -> None:
        """Takes the signals, also from a library that has taken them since."""
        if threading.current_thread() is not threading.main_thread():  # Python delivers signals to no other
            return
        for number in SIGNALS:
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._stepping.exists() and not (self.is_set and number == signal.SIGINT):
            self.path.touch()
            name = signal.Signals(number).name
            # Not print: the signal may have come in the midst of one.
            os.write(2, f"\n{name}: this step is finished and saved first; press Ctrl-C again to end at once\n".encode())
        elif number == signal.SIGINT:
            raise KeyboardInterrupt
        else:
            raise SystemExit(128 + number)
