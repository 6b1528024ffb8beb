"""A real `omni-rollout serve` in a process of its own, and what an engine in this process makes of the same requests."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch
from transformers import AutoTokenizer

from omni_rollout.config import TrainConfig
from omni_rollout.data.collate import Collator
from omni_rollout.launch.compose import compose
from omni_rollout.types import Trajectory

LIMIT = 300  # seconds; for a busy machine


class Serving:
    """`url` once it answers; a context manager."""

    def __init__(self, overrides: Sequence[str], log: Path, port: int = 0, **environment: str) -> None:
        command = [sys.executable, "-m", "omni_rollout.cli", "serve", *overrides, "threads=1", f"serve.port={port}"]
        self.log = log
        self.images = log.with_name(f"{log.name}.tmp")  # where it keeps input images, among others
        self.images.mkdir(exist_ok=True)
        with log.open("ab") as errors:
            environ = {**os.environ, "TMPDIR": str(self.images), **environment}
            self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environ)
        try:
            ready, _, _ = select.select([self.process.stdout], [], [], LIMIT)
            assert ready and self.process.stdout is not None, log.read_text()[-3000:]
            line = self.process.stdout.readline()
            assert line.startswith("serving omni-rollout at http://"), log.read_text()[-3000:]
        except BaseException:
            self.process.kill()
            raise
        self.url = line.split()[-1]

    def __enter__(self) -> Serving:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        try:
            return self.process.wait(LIMIT)
        finally:
            self.process.kill()

    def metrics(self) -> dict[str, float]:
        lines = [line for line in httpx.get(f"{self.url}/metrics").text.splitlines() if not line.startswith("#")]
        return {name.removeprefix("omni_rollout:"): float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}

    def idle(self) -> dict[str, float]:
        """Its metrics, once it has nothing left to do."""
        end = time.monotonic() + LIMIT
        while time.monotonic() < end:
            found = self.metrics()
            if not found["num_requests_running"] and not found["num_requests_waiting"]:
                return found
            time.sleep(0.05)
        raise AssertionError(found)


def config_of(overrides: Sequence[str]) -> TrainConfig:
    return compose([*overrides, "threads=1"], name="rollout", unused=("prompts",))


def collator_of(config: TrainConfig) -> Collator:
    tokenizer = AutoTokenizer.from_pretrained(config.model.path, subfolder="tokenizer")
    return Collator(config.model.family, tokenizer, config.sampling, config.collate)


def assert_same(one: Trajectory, other: Trajectory) -> None:
    """Every tensor, the image, and all that is said of them but in whose company it was sampled."""
    assert one.spec == other.spec and (one.seed, one.group_id, one.member) == (other.seed, other.group_id, other.member)
    for name in ("latents", "log_probs", "step_indices", "sigmas", "timesteps", "prompt_embeds", "prompt_embeds_mask"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name
    for name in ("negative_prompt_embeds", "negative_prompt_embeds_mask"):
        left, right = getattr(one, name), getattr(other, name)
        assert (left is None) == (right is None) and (left is None or torch.equal(left, right)), name
    assert one.conditions.keys() == other.conditions.keys()
    assert all(torch.equal(tensor, other.conditions[name]) for name, tensor in one.conditions.items())
    assert np.array_equal(one.media, other.media)
    assert known(one) == known(other)


def known(trajectory: Trajectory) -> dict[str, Any]:
    return {**trajectory.fingerprint, "batch_sizes": None, "policy_version": trajectory.policy_version}
