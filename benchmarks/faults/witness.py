"""What a run folder shows while a run writes into it, and after everything that was done to the run."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from omni_rollout.trajectories.capsule import load_capsule
from omni_rollout.types import Trajectory

POLL_SECONDS = 0.01
OF_THE_MACHINE = ("timing_s/", "perf/", "rollout/", "checkpoint/", "alerts")  # how a step went, not what it gave


@dataclass(frozen=True, kw_only=True)
class Finished:
    """One finished trajectory, as it was written; the copy stays when a checkpoint makes the run delete its own."""

    request_id: str
    time: float
    copy: Path

    @property
    def step(self) -> int:
        return int(self.request_id.partition("-")[0])


class Witness:
    """Watches a run folder from outside, over all processes that work in it one after another.

    Args:
        run_dir: may be absent yet; may be the path of another mount namespace, which is gone after the run.
        keep: folder for copies of finished trajectories.
    """

    def __init__(self, run_dir: Path, keep: Path) -> None:
        self.run_dir, self._keep = run_dir, keep
        keep.mkdir(parents=True)
        self.finished: list[Finished] = []
        self.steps: list[tuple[float, int]] = []  # when the line of a step appeared; a step that is repeated appears again
        self._seen: set[tuple[str, int, int]] = set()
        self._last_step = 0
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._end.set()
        self._thread.join()

    def done(self) -> int:
        """The last step whose line has been written."""
        return self._last_step

    def of_step(self, step: int) -> list[Finished]:
        return [one for one in list(self.finished) if one.step == step]

    def _watch(self) -> None:
        while not self._end.wait(POLL_SECONDS):
            self._look()
        self._look()

    def _look(self) -> None:
        for path in self._kept():
            try:
                status = path.stat()
                key = (path.name, status.st_ino, status.st_mtime_ns)
                if key in self._seen:
                    continue
                copy = self._keep / f"{path.stem}.{len(self.finished):04d}.safetensors"
                shutil.copyfile(path, copy)
            except FileNotFoundError:  # deleted in between: a checkpoint holds it
                continue
            self._seen.add(key)
            self.finished.append(Finished(request_id=path.stem, time=status.st_mtime_ns / 1e9, copy=copy))
        if not (self.run_dir / "metrics.jsonl").exists():
            return
        last = max((line["step"] for line in metrics(self.run_dir)), default=0)
        if last > self._last_step:
            self.steps.append((time.time(), last))
        self._last_step = last

    def _kept(self) -> list[Path]:
        try:
            return sorted(self.run_dir.glob("rollout/step_*/*.safetensors"))
        except FileNotFoundError:  # a folder was deleted while it was being listed
            return []


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; a last one that is being written is left out."""
    path = run_dir / "metrics.jsonl"
    try:
        text = path.read_text()
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def differences(run_dir: Path, witness: Witness, other_dir: Path, other: Witness, steps: int | None = None) -> list[str]:
    """Where a run is not another, bit for bit: metrics, images, seeds, every trajectory, the newest checkpoint.

    Args:
        steps: only so many are compared, the first, and neither seeds nor checkpoint.
    """
    lines, expected = (
        [{key: value for key, value in line.items() if not key.startswith(OF_THE_MACHINE)} for line in metrics(folder)][:steps]
        for folder in (run_dir, other_dir)
    )
    found = [
        f"metrics of step {step + 1}" for step in range(len(expected)) if lines[step : step + 1] != expected[step : step + 1]
    ]
    found += [f"{len(lines)} steps, not {len(expected)}"] if len(lines) != len(expected) else []
    names = [f"images/step_{line['step']:04d}.png" for line in expected]
    if steps is None:
        checkpoint = other_dir / f"checkpoints/step_{len(expected):05d}"
        names += ["seeds.jsonl", *[str(path.relative_to(other_dir)) for path in checkpoint.rglob("*.safetensors")]]
    found += [name for name in names if _content(run_dir / name) != _content(other_dir / name)]
    there = {one.request_id: load_capsule(one.copy) for one in other.finished if one.step <= len(expected)}
    for one in witness.finished:
        if one.step <= len(expected) and not (
            one.request_id in there and same_sample(load_capsule(one.copy), there[one.request_id])
        ):
            found.append(f"trajectory {one.request_id}")
    return found


def same_sample(one: Trajectory, other: Trajectory) -> bool:
    tensors = all(torch.equal(getattr(one, name), getattr(other, name)) for name in ("latents", "log_probs", "step_indices"))
    return tensors and bool((one.image == other.image).all()) and one.seed == other.seed


def counted_twice_or_not(run_dir: Path, steps: int, per_step: int) -> list[str]:
    """What contradicts that every trajectory of the run was learned from exactly once."""
    lines = metrics(run_dir)
    found = [] if [line["step"] for line in lines] == list(range(1, steps + 1)) else [f"steps {[x['step'] for x in lines]}"]
    found += [f"step {line['step']}: a seed was used twice" for line in lines if line["parity/seed_collisions"]]
    entries = [json.loads(line) for line in (run_dir / "seeds.jsonl").read_text().splitlines()]
    for kind in ("seed", "initial_noise"):
        count = Counter(entry["request_id"] for entry in entries if kind in entry)
        found += [f"{name}: {number} times in seeds.jsonl ({kind})" for name, number in count.items() if number != 1]
        if len(count) != steps * per_step:
            found.append(f"{len(count)} requests in seeds.jsonl ({kind}), expected {steps * per_step}")
    return found


def mixed_policies(run_dir: Path, witness: Witness) -> Iterator[str]:
    """What contradicts that each trajectory is of one policy: the one of its step, or with rollout.ahead=1 the one before.

    The trainer scores each step of each trajectory again, under the weights of that step: equal bits leave room for no other.
    """
    for line in metrics(run_dir):
        if line["parity/ppo_kl_mb0"] != 0.0 or line["parity/bitwise_equal_fraction"] != 1.0:
            yield f"step {line['step']}: the trainer's log-probs are not the engine's"
    policies = {line["step"]: (line["step"] - 1 - line["staleness"], line["weights/digest"]) for line in metrics(run_dir)}
    for one in witness.finished:
        trajectory = load_capsule(one.copy)
        if (trajectory.policy_version, trajectory.fingerprint["weights"]) != policies.get(one.step):
            yield f"{one.request_id} was sampled by version {trajectory.policy_version}, not by the policy of its step"


def _content(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None
