"""A trainer rank that hangs is noticed, named, and given up: real processes of Ray, one of them stopped."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import psutil
import pytest

pytest.importorskip("verl")

import ray
from ray.exceptions import RayActorError

from omni_rollout.integrations.verl.deaths import DEATHS, HungError, Pulse, answers, find_dead, places

PATIENCE = 30


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    modules = "omni_rollout.integrations.verl.platform,omni_rollout.integrations.verl.trainer"  # as in a run
    environment = {"VERL_USE_EXTERNAL_MODULES": modules, "VERL_PLATFORM": "cpu"}
    ray.init(num_cpus=4, include_dashboard=False, object_store_memory=128 << 20, runtime_env={"env_vars": environment})
    yield
    ray.shutdown()


@pytest.fixture
def ranks(cluster: None) -> Any:
    class Rank:  # here, so that it travels by value: processes of Ray cannot import tests
        def work(self, seconds: float) -> float:
            time.sleep(seconds)
            return seconds

        def stop(self) -> None:
            os.kill(os.getpid(), signal.SIGSTOP)

        def fail(self) -> None:
            raise ValueError("a rank's own")

    return [ray.remote(Rank).remote() for _ in range(2)]


def test_a_process_whose_loop_turns_no_more_is_named_and_killed(ranks):
    class Loop:
        async def work(self) -> None:
            await asyncio.sleep(3)

        async def stop(self) -> None:
            os.kill(os.getpid(), signal.SIGSTOP)

    stopped = ray.remote(Loop).remote()
    ((_, gone),) = places([stopped])
    os.kill(gone, signal.SIGSTOP)
    with pytest.raises(HungError, match="the loop gave no answer for 2 s"):
        Pulse(stopped, "the loop", 2)
    worker = ray.remote(Loop).remote()
    ((_, pid),), pulse = places([worker]), Pulse(worker, "the loop", 2)
    working = worker.work.remote()
    while not ray.wait([working], timeout=0.2)[0]:
        pulse.check()  # longer than its limit, and it answers meanwhile
    pulse._ask()
    pulse._since -= 1000  # as if the driver itself had stood still, with the answer on its way
    pulse.check()
    worker.stop.remote()
    start = time.monotonic()
    with pytest.raises(HungError, match=rf"the loop \(process {pid}\) is stopped: it gave no answer for 2 s"):
        while time.monotonic() - start < 30:
            pulse.check()
            time.sleep(0.2)
    with pytest.raises(RayActorError):
        ray.get(worker.__ray_ready__.remote(), timeout=30)


def test_ranks_that_answer_in_time_are_left_alone(ranks):
    where = places(ranks)
    assert answers([rank.work.remote(0.1) for rank in ranks], ranks, where, PATIENCE) == [0.1, 0.1]
    assert [psutil.pid_exists(pid) for _, pid in where] == [True, True]


def test_the_one_that_hangs_is_named_and_all_are_given_up(ranks):
    where = places(ranks)
    (_, busy), (_, stopped) = where
    with pytest.raises(HungError) as hung:
        answers([ranks[0].work.remote(1000), ranks[1].stop.remote()], ranks, where, 2)
    assert f"rank 0 (process {busy}) is sleeping" in str(hung.value)
    assert f"rank 1 (process {stopped}) is stopped" in str(hung.value)
    assert "2 s (launch.timeout)" in str(hung.value)
    assert isinstance(hung.value, DEATHS)  # so all is started again
    find_dead(ranks, hung.value)  # it has a cause: nobody is asked
    _, left = psutil.wait_procs([psutil.Process(pid) for _, pid in where if psutil.pid_exists(pid)], timeout=PATIENCE)
    assert not left


def test_a_rank_that_fails_is_told_before_the_others_are_done(ranks):
    where, start = places(ranks), time.monotonic()
    with pytest.raises(ValueError, match="a rank's own"):
        answers([ranks[0].work.remote(1000), ranks[1].fail.remote()], ranks, where, 1000)
    assert time.monotonic() - start < 1000
