"""Freed memory stays, and idle helpers go: seen from outside, in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's and libgomp's")

FAULTS = """
import resource, sys, threading, torch
from omni_rollout.diffusion.host import keep_freed_memory
if sys.argv[1] == "keep":
    print(keep_freed_memory(), end=" ")
x = torch.zeros(2**22)
def work():
    for round in range(24):
        if round == 4:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        y = x * 2  # 16 MiB
        z = torch.cat([y, y, y])  # 48 MiB
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
thread = threading.Thread(target=work)
thread.start()
thread.join()
"""

STOWED = """
import sys, torch
from pathlib import Path
from omni_rollout.diffusion.host import keep_freed_memory
from omni_rollout.models.base.stowed import Stowed
print(keep_freed_memory())
def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 >> 20
tensors = [torch.ones(2**24) for _ in range(4)]  # 64 MiB each
behind = torch.ones(2**20)  # so that they are not the end of the heap
stowed = Stowed(lambda: tensors, Path(sys.argv[1]))
here = resident()
stowed.leave()
print(here - resident())
stowed.come_back()
print(resident() - here, all(bool((one == 1).all()) for one in tensors))
"""

HELPERS = """
import os, threading, time, torch
from omni_rollout.diffusion.host import let_helpers_go
torch.set_num_threads(3)
def threads():
    time.sleep(0.2)
    return len(os.listdir("/proc/self/task"))
x = torch.randn(2**20)
alone = threads()
first = x * x
with_helpers = threads()
go, done = threading.Event(), threading.Event()
def other():
    torch.set_num_threads(3)
    x * x
    done.set()
    go.wait()
beside = threading.Thread(target=other)
beside.start()
done.wait()
both = threads()
let_helpers_go()
after = threads()
again = torch.equal(x * x, first)
back = threads()
print(alone, with_helpers - alone, both - with_helpers, after - both, back - after, again, torch.get_num_threads())
go.set()
beside.join()
"""


def printed(program: str, *arguments: str, **environment: str) -> list[str]:
    own = {key: value for key, value in os.environ.items() if not key.startswith("MALLOC_")}
    made = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, env={**own, **environment}, check=True
    )
    return made.stdout.split()


@LINUX
def test_a_thread_computes_in_the_pages_that_it_had():
    without = int(printed(FAULTS, "leave")[0])
    taken, kept = printed(FAULTS, "keep")
    assert taken == "True"
    assert without > 20 * 4096 and int(kept) < without / 4


@LINUX
@pytest.mark.parametrize("name, value", [("MALLOC_MMAP_THRESHOLD_", "131072"), ("GLIBC_TUNABLES", "glibc.malloc.check=0")])
def test_what_the_environment_says_of_the_allocator_stands(name, value):
    taken, _ = printed(FAULTS, "keep", **{name: value})
    assert taken == "False"


@LINUX
def test_what_is_offloaded_leaves_the_process_all_the_same(tmp_path):
    taken, left, more, equal = printed(STOWED, str(tmp_path))
    assert taken == equal == "True"
    assert int(left) >= 4 * 64 - 8 and abs(int(more)) < 8


@LINUX
def test_a_threads_own_helpers_go_and_come_back_and_no_other():
    alone, helpers, of_other, gone, back, same, number = printed(HELPERS)
    assert int(alone) >= 1 and (helpers, of_other) == ("2", "3")
    assert (gone, back) == ("-2", "2")
    assert (same, number) == ("True", "3")
