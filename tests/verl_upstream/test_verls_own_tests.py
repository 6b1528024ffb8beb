"""verl's unit tests, unchanged, with our class where theirs stood."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

HERE = Path(__file__).parent
FILES = list(tomllib.loads((HERE / "table.toml").read_text()))
LIMIT = 500  # seconds
ENVIRONMENT = {
    "RAY_ADDRESS": "local",  # never a cluster that is there already
    # Places, not cores, and no worker before it is needed: verl's tests ask for as many as a large machine has.
    "RAY_OVERRIDE_RESOURCES": '{"CPU": 100}',
    "RAY_enable_worker_prestart": "0",
    "RAY_prestart_worker_first_driver": "0",
    "RAY_DEFAULT_OBJECT_STORE_MAX_MEMORY_BYTES": str(1 << 30),
    "PYTHONDONTWRITEBYTECODE": "1",
}
# A defect of ours -> the test of verl's that must see it.
SEEN_BY = {
    "the platform never stands in": (
        "plugin/test_platform_abstraction.py",
        "test_empty_triggers_auto_detection",
    ),
    "the buffer drops a group": ("trainer/ppo/v1/test_replay_buffer_on_cpu.py", "test_sync_grpo_step_returns_complete_groups"),
    "the trainer never stops the profiler": (
        "trainer/ppo/v1/test_rollout_profiling_on_cpu.py",
        "test_shared_worker_group_is_profiled_once",
    ),
    "the rank does not start as verl's": (
        "single_controller/test_get_set_dispatch_collect_cpu.py",
        "test_get_set_dispatch_collect_cpu",
    ),
    "the platform has no resource name": ("single_controller/test_worker_group_basics.py", "test_basics"),
}


def run(file: str, checkout: Path, test: str | None = None, **more: str) -> tuple[int, str]:
    """(pytest's exit status, what it said), in a process of its own; nothing that it started stays."""
    path = Path("tests") / file
    if not (checkout / path).is_file():
        pytest.skip(f"{path} is not in {checkout}: the wheel leaves some of verl's tests out")
    options = ["-q", "-rA", "-p", "no:cacheprovider", "-p", "substitutes"]
    environment = {
        **os.environ,
        **ENVIRONMENT,
        "PYTHONPATH": str(HERE),
        "VERL_USE_EXTERNAL_MODULES": "substitutes",
        "SUBSTITUTE": file,
        **more,
    }
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "pytest", *options, "-k", test or "", str(path)],
        cwd=checkout,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        said, _ = process.communicate(timeout=LIMIT)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # Ray's processes end when their driver is gone
    return process.returncode, said


@pytest.mark.parametrize("file", FILES)
def test_verls_own_tests_pass(file: str, checkout: Path) -> None:
    status, said = run(file, checkout)
    print(said[-4000:])
    assert status == 0


@pytest.mark.parametrize("defect", SEEN_BY)
def test_verls_own_tests_see_a_defect_of_ours(defect: str, checkout: Path) -> None:
    file, test = SEEN_BY[defect]
    status, said = run(file, checkout, test, PLANTED=defect)
    assert status == 1, said[-4000:]
