"""Finished trajectories on disk until a checkpoint holds what was learned from them: a run that dies loses none."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from omni_rollout.trajectories.capsule import CapsuleError, load_capsule, save_capsule
from omni_rollout.types import RolloutRequest, Trajectory


class Journal:
    """`run_dir/rollout/step_XXXXX/REQUEST_ID.safetensors`, a capsule for each.

    Args:
        keep: whether to write; what is there is read in any case.
    """

    def __init__(self, run_dir: str | Path, *, keep: bool = True) -> None:
        self._folder = Path(run_dir) / "rollout"
        self._keep = keep
        self.failure: str | None = None  # of this step, if one could not be kept

    def keep(self, step: int, trajectory: Trajectory) -> None:
        """Writes one at once. Where that fails, the step's are deleted to make room, and `failure` says why.

        Not one of a data set's images: it is encoded again sooner than read.
        """
        if not self._keep or self.failure or trajectory.prompt.targets:
            return
        folder = self._step(step)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            save_capsule(trajectory, folder / f"{trajectory.request_id}.safetensors")
        except (OSError, CapsuleError) as error:
            self.failure = str(error)
            shutil.rmtree(folder, ignore_errors=True)

    def take(
        self, step: int, requests: Iterable[RolloutRequest], expected: Mapping[str, Any], policy_version: int
    ) -> tuple[list[Trajectory], list[RolloutRequest]]:
        """The trajectories that need not be sampled again, and the requests that must be. What does not fit is said.

        Args:
            expected: what a trajectory's fingerprint must hold, e.g. the digest of the weights.
        """
        self.failure = None
        kept: list[Trajectory] = []
        left: list[RolloutRequest] = []
        for request in requests:
            path = self._step(step) / f"{request.request_id}.safetensors"
            trajectory = _read(path, request, {**expected, "policy_version": policy_version}) if path.exists() else None
            if trajectory is None:
                left.append(request)
            else:
                kept.append(replace(trajectory, prompt=request.prompt))
        if kept:
            print(f"step {step}: {len(kept)} trajectories were finished before the run was stopped, {len(left)} are sampled")
        return kept, left

    def forget(self, step: int) -> None:
        """Deletes what was kept of all steps up to `step`."""
        for folder in self._folder.glob("step_*"):
            if int(folder.name.removeprefix("step_")) <= step:
                shutil.rmtree(folder)

    def count(self, after: int) -> int:
        """How many are kept, of steps after `after`."""
        folders = [folder for folder in self._folder.glob("step_*") if int(folder.name.removeprefix("step_")) > after]
        return sum(len(list(folder.glob("*.safetensors"))) for folder in folders)

    def _step(self, step: int) -> Path:
        return self._folder / f"step_{step:05d}"


def _read(path: Path, request: RolloutRequest, expected: Mapping[str, Any]) -> Trajectory | None:
    try:
        trajectory = load_capsule(path)
    except CapsuleError as error:
        why: Sequence[str] = [str(error)]
    else:
        why = _differences(trajectory, request, expected)
        if not why:
            return trajectory
    print(f"{path.name} is sampled again, what was kept does not fit: {'; '.join(why)}")
    path.unlink()
    return None


def _differences(trajectory: Trajectory, request: RolloutRequest, expected: Mapping[str, Any]) -> list[str]:
    found = {**trajectory.fingerprint, "policy_version": trajectory.policy_version}
    versions = {name: version(name) for name in trajectory.fingerprint.get("versions", {})}
    pairs = {
        **{name: (found.get(name), value) for name, value in {**expected, "versions": versions}.items()},
        **{name: (getattr(trajectory, name), getattr(request, name)) for name in ("request_id", "seed", "prompt", "spec")},
    }
    return [f"its {name} is {have}, expected {want}" for name, (have, want) in pairs.items() if have != want]
