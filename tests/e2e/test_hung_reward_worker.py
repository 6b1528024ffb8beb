"""A reward worker that hangs is noticed, named, and started again: the run's own workers on Ray, one of them stopped."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest

pytest.importorskip("verl")

import ray

from omni_rollout.config import RewardConfig, RolloutConfig, TrainConfig
from omni_rollout.integrations.verl.deaths import DEATHS, HungError
from omni_rollout.integrations.verl.launch import verl_config
from omni_rollout.integrations.verl.records import adopt
from omni_rollout.integrations.verl.reward import RewardWorkers
from omni_rollout.integrations.verl.scores import Scores
from omni_rollout.launch.compose import compose
from omni_rollout.types import Prompt

pytestmark = pytest.mark.slow

SAMPLE: Any = SimpleNamespace(media=np.zeros((64, 64, 3), dtype=np.uint8), prompt=Prompt(text="a red cat"))
SLOW = "import time\n\ndef slow(images, prompts, metadata):\n    time.sleep(6)\n    return [1.0 for _ in images]\n"


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray.init(num_cpus=4, include_dashboard=False, object_store_memory=128 << 20)
    yield
    ray.shutdown()


def workers_of(folder: Path, checkpoint: Path, *overrides: str) -> tuple[RewardWorkers, TrainConfig]:
    (folder / "prompts.txt").write_text("a red cat")
    run = compose([f"model.path={checkpoint}", f"prompts={folder / 'prompts.txt'}", *overrides])
    config = verl_config(run)
    adopt(config)
    return RewardWorkers(config=config), run


async def scored(scores: Scores, times: int) -> list[dict[str, Any]]:
    return await asyncio.gather(*(scores.of(SAMPLE) for _ in range(times)))


def process_of(worker: Any) -> int:
    return ray.get(worker.__ray_call__.remote(lambda _: os.getpid()))


def test_the_one_that_hangs_is_named_and_started_again(cluster, random_checkpoint, tmp_path, caplog):
    overrides = ("reward=jpeg_compressibility", "rollout.timeout=43", "reward.timeout=2")
    workers, run = workers_of(tmp_path, random_checkpoint, *overrides)
    (worker,) = workers.reward_loop_workers
    scores = Scores([worker], run)
    first = asyncio.run(scored(scores, 1))
    stopped = process_of(worker)
    os.kill(stopped, signal.SIGSTOP)
    with caplog.at_level(logging.WARNING):
        assert asyncio.run(scored(scores, 3)) == 3 * first
    (line,) = [record.getMessage() for record in caplog.records if "reward worker" in record.getMessage()]
    assert line.startswith(f"reward worker 0 (process {stopped}) is stopped: it gave no score for 45 s (rollout.timeout, ")
    assert process_of(worker) != stopped and not psutil.pid_exists(stopped)
    ray.kill(worker)


def test_one_that_works_for_longer_than_its_limit_is_left_alone(cluster, random_checkpoint, tmp_path):
    (tmp_path / "slow.py").write_text(SLOW)
    reward = ("reward.weights={slow: 1.0}", f"reward.source.slow={tmp_path / 'slow.py'}:slow")
    workers, run = workers_of(tmp_path, random_checkpoint, *reward, "rollout.timeout=12", "reward.timeout=8")
    (worker,) = workers.reward_loop_workers
    scores, before, start = Scores([worker], run), process_of(worker), time.monotonic()
    assert [score["reward_score"] for score in asyncio.run(scored(scores, 4))] == [1.0] * 4
    assert time.monotonic() - start > 20, "else this shows nothing"
    assert process_of(worker) == before
    ray.kill(worker)


def test_one_that_hangs_again_ends_the_run(cluster):
    class Worker:  # here, so that it travels by value: processes of Ray cannot import tests
        async def compute_score(self, _: Any) -> None:
            os.kill(os.getpid(), signal.SIGSTOP)

    worker = ray.remote(max_restarts=-1)(Worker).remote()
    process_of(worker)
    run: Any = SimpleNamespace(rollout=RolloutConfig(timeout=14), reward=RewardConfig(weights={"any": 1.0}, timeout=1))
    with pytest.raises(HungError, match=r"reward worker 0 .*gave no score for 15 s .*, as before it was started again") as hung:
        asyncio.run(scored(Scores([worker], run), 2))
    assert isinstance(hung.value, DEATHS)  # so all is started again
    ray.kill(worker)
