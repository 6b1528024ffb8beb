"""What `make memory` reads of colocated processes from outside: whose memory, and in which phase."""

from __future__ import annotations

import subprocess
import sys

import psutil

from benchmarks.memory_colocated import Watch

MIB = 1 << 20
HOLDS = "import sys, time; held = b'x' * (int(sys.argv[1]) << 20); time.sleep(4)"
STARTS = """
import subprocess, sys
rank = "ray::ColocatedRank."
titles = {rank + "update_policy()": 64, rank + "init_model()": 32, "ray::AgentLoopWorker": 48, "raylet": 16}
held = [subprocess.Popen([title, "-c", sys.argv[1], str(size)], executable=sys.executable) for title, size in titles.items()]
for process in held:
    process.wait()
"""


def test_each_process_is_counted_where_it_belongs() -> None:
    run = subprocess.Popen([sys.executable, "-c", STARTS, HOLDS])
    watch = Watch(psutil.Process(run.pid))
    watch.start()
    assert run.wait() == 0
    watch.join()
    peaks = watch.peaks
    update, start = sorted(peaks.ranks, key=lambda phases: "start" in phases and "update" not in phases)
    assert 64 * MIB < update["update"] < 96 * MIB and 32 * MIB < start["start"] < 64 * MIB and set(start) == {"start"}
    assert peaks.rank == update["update"] and 64 * MIB < peaks.together < 96 * MIB, "the start does not count"
    assert 48 * MIB < peaks.beside < 100 * MIB and 16 * MIB < peaks.ray < 48 * MIB
