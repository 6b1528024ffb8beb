"""Signals and the stop file: before a step at once, within one at its end."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import pytest

from omni_rollout.run.stop import SIGNALS, StopFlag


@pytest.mark.parametrize("number", SIGNALS)
def test_before_the_first_step_a_signal_ends_the_process(tmp_path: Path, number: signal.Signals) -> None:
    stop = StopFlag(tmp_path)
    with stop.signals(), pytest.raises((SystemExit, KeyboardInterrupt)) as ended:
        os.kill(os.getpid(), number)
    assert ended.type is KeyboardInterrupt or ended.value.code == 143
    assert not stop.is_set


def test_within_a_step_a_signal_sets_the_flag_and_a_second_ctrl_c_ends_at_once(tmp_path: Path, capfd) -> None:
    stop = StopFlag(tmp_path)
    stop.stepping()
    with stop.signals():
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)  # Slurm repeats itself
        assert stop.is_set and StopFlag(tmp_path).is_set, "in every process that looks"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert "SIGTERM: this step is finished and saved first" in capfd.readouterr().err


def test_the_handlers_are_given_back(tmp_path: Path) -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    with StopFlag(tmp_path).signals():
        assert [signal.getsignal(number) for number in SIGNALS] != before
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_a_thread_gets_no_signals_but_sees_the_file(tmp_path: Path) -> None:
    seen = []

    def loop() -> None:
        stop = StopFlag(tmp_path)
        with stop.signals():
            stop.path.touch()
            seen.append(stop.is_set)
        stop.clear()
        seen.append(stop.is_set)

    thread = threading.Thread(target=loop)
    thread.start()
    thread.join()
    assert seen == [True, False]
