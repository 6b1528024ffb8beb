"""The checkpoints of one run: when they are due, how many are kept, and what a save that fails costs."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from omni_rollout.config import TrainConfig
from omni_rollout.errors import RunFailedError
from omni_rollout.run.folder import candidates, checkpoint_folders, is_step, step_of
from omni_rollout.trajectories.journal import Journal


class Checkpoints:
    """`last` is the newest that this process wrote."""

    def __init__(self, config: TrainConfig, journal: Journal) -> None:
        self._trainer, self._journal = config.trainer, journal
        self._run_dir = Path(config.run_dir)
        self.last: Path | None = None
        self._failure: str | None = None  # of the latest save
        self._told = True

    def due(self, step: int, *, stopping: bool = False) -> bool:
        every = self._trainer.save_every
        return stopping or step == self._trainer.steps or (every > 0 and step % every == 0)

    def save(self, step: int, write: Callable[[Path], None]) -> None:
        """Has `write` make the checkpoint of a step, then deletes what it replaces. An OSError is said, and the run goes on."""
        folder = self._run_dir / "checkpoints" / f"step_{step:05d}"
        try:
            write(folder)
        except OSError as error:
            self._failure, self._told = f"the checkpoint of step {step} could not be written: {error}", False
            print(f"{self._failure}; those before it are still there", file=sys.stderr, flush=True)
            return
        self._failure, self.last = None, folder
        before = [step_of(folder) for folder in checkpoint_folders(self._run_dir) if step_of(folder) < step]
        self._prune(step)
        # Should this one turn out damaged, a run goes on from the one before: what was sampled since is kept for it.
        self._journal.forget(before[0] if before else 0)

    def after(self, step: int) -> None:
        """Of a step without a checkpoint."""
        if self._trainer.save_every == 0:  # a run that keeps no checkpoint keeps the trajectories of one step alone
            self._journal.forget(step)

    def notes(self) -> dict[str, str]:
        """What the next line of metrics has to say: each failure once."""
        if self._told or self._failure is None:
            return {}
        self._told = True
        return {"checkpoint/failed": self._failure}

    def check(self) -> None:
        """At the end of a run.

        Raises:
            RunFailedError: its last checkpoint is not on disk.
        """
        if self._failure is not None:
            newest = checkpoint_folders(self._run_dir)
            where = f"the newest one is {newest[0]}" if newest else "there is no other one"
            raise RunFailedError(f"{self._failure}; {where}. Make room, then {how_to_go_on(self._run_dir)}")

    def _prune(self, step: int) -> None:
        """Later ones belong to a past that this run has left, by going on from an earlier one."""
        folders = checkpoint_folders(self._run_dir)
        later = [folder for folder in folders if step_of(folder) > step]
        earlier = [folder for folder in folders if step_of(folder) <= step]
        keep = self._trainer.keep_checkpoints
        for folder in [*later, *(earlier[keep:] if keep else [])]:
            shutil.rmtree(folder)


def how_to_go_on(run_dir: str | Path) -> str:
    newest = candidates(run_dir)
    if not newest:
        where = "from the beginning, for there is no checkpoint yet,"
    else:  # another run's may have any name
        where = f"after step {step_of(newest[0])}" if is_step(newest[0]) else f"from {newest[0]}"
    return f"go on {where} with the same command and trainer.resume=auto run_dir={run_dir}"
