"""Processes that die or hang and that nothing replaces in place: who it was, and how often the run was started again."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import ray
from ray.exceptions import (
    GetTimeoutError,
    LocalRayletDiedError,
    NodeDiedError,
    ObjectLostError,
    RayActorError,
    RayTaskError,
    WorkerCrashedError,
)
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy


class HungError(RuntimeError):
    """A process is silent, and was given up: like a dead one."""


DEATHS = (HungError, RayActorError, WorkerCrashedError, NodeDiedError, ObjectLostError, LocalRayletDiedError)
PATIENCE = 60.0  # seconds for a worker to answer whether it is there


def cause_of(error: BaseException) -> BaseException:
    """What was raised in the process where it all began."""
    while isinstance(error, RayTaskError) and isinstance(error.cause, BaseException):
        error = error.cause
    return error


def describe(error: BaseException) -> str:
    """One line: what Ray says first, and which kind of process it was."""
    text = str(error)
    kind = re.search(r"class_name: (\w+)", text)
    return text.splitlines()[0] + (f" ({kind.group(1)})" if kind else "")


def find_dead(workers: Sequence[Any], error: BaseException) -> None:
    """Raises RayActorError where one of the workers is dead: the others then complain of a connection, not of a death."""
    if isinstance(cause_of(error), DEATHS):
        return
    for worker in workers:
        try:
            ray.get(worker.__ray_ready__.remote(), timeout=PATIENCE)
        except RayActorError as death:
            raise death from error
        except GetTimeoutError:  # it is busy, not dead
            continue


def places(workers: Sequence[Any]) -> list[tuple[str, int]]:
    """Node and process of each: to be asked while they answer."""
    return ray.get([place(worker) for worker in workers])


def place(worker: Any) -> Any:
    """A reference of its node and process."""
    return worker.__ray_call__.remote(lambda _: (ray.get_runtime_context().get_node_id(), os.getpid()))


def answers(references: Sequence[Any], workers: Sequence[Any], where: Sequence[tuple[str, int]], timeout: float) -> list[Any]:
    """What the workers, one call each, return. They wait for each other, so where one hangs no other answers either.

    Args:
        where: `places` of them.

    Raises:
        HungError: not all did within `timeout` seconds; then all are killed, and what each was doing is in the message.
    """
    try:
        return ray.get(list(references), timeout=timeout)
    except GetTimeoutError as error:
        told = ", ".join(f"rank {rank} (process {pid}) is {status_of(node, pid)}" for rank, (node, pid) in enumerate(where))
        for worker in workers:
            ray.kill(worker)
        raise HungError(f"the trainer ranks gave no answer for {timeout:g} s (launch.timeout): {told}") from error


class Pulse:
    """Of a process with a loop of its own: whether that still turns.

    Args:
        name: what the process is called when it does not.
        timeout: seconds (`rollout.timeout`).

    Raises:
        HungError: it does not answer at all.
    """

    def __init__(self, worker: Any, name: str, timeout: float) -> None:
        self._worker, self._name, self._timeout = worker, name, timeout
        try:
            self._node, self._pid = ray.get(place(worker), timeout=timeout)
        except GetTimeoutError as error:
            ray.kill(worker)
            raise HungError(f"{name} gave no answer for {timeout:g} s (rollout.timeout)") from error
        self._ask()

    def check(self) -> None:
        """To be called again and again; returns at once where there is nothing to say.

        Raises:
            HungError: what was asked `timeout` seconds ago has no answer; the process is killed then.
            RayActorError: it is dead.
        """
        if ray.wait([self._asked], timeout=0)[0]:
            ray.get(self._asked)
            self._ask()
        elif time.monotonic() - self._since > self._timeout and not ray.wait([self._asked], timeout=1)[0]:
            told = f"{self._name} (process {self._pid}) is {status_of(self._node, self._pid)}"
            ray.kill(self._worker)
            raise HungError(f"{told}: it gave no answer for {self._timeout:g} s (rollout.timeout)")

    def _ask(self) -> None:
        self._asked, self._since = self._worker.__ray_ready__.remote(), time.monotonic()


def status_of(node: str, pid: int) -> str:
    """As the system of its node has it; a process cannot be asked that does not answer."""

    def status() -> str:  # travels by value: a process that imports verl's plug-ins first could not import this file
        try:
            return str(psutil.Process(pid).status())
        except psutil.NoSuchProcess:
            return "gone"

    there: Any = NodeAffinitySchedulingStrategy(node, soft=False)  # Ray types the others alone
    ask = ray.remote(num_cpus=0, scheduling_strategy=there)(status)
    try:
        return ray.get(ask.remote(), timeout=PATIENCE)
    except (*DEATHS, GetTimeoutError, RayTaskError) as error:
        return f"unknown ({str(error).splitlines()[-1]})"


def note_restart(run_dir: str, why: str) -> None:
    """A line in `run_dir/restarts.jsonl`."""
    with (Path(run_dir) / "restarts.jsonl").open("a") as file:
        file.write(json.dumps({"why": why}) + "\n")


def restarts(run_dir: str) -> int:
    path = Path(run_dir) / "restarts.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0
