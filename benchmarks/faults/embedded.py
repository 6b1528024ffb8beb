"""Faults of a run that is one process."""

from __future__ import annotations

import math
import os
import shutil
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from benchmarks.faults.scene import PER_STEP, STEPS, TIMEOUT, Scene
from benchmarks.faults.witness import metrics
from omni_rollout.run.folder import checkpoint_folders

LAST = STEPS["embedded"]
DISK_BYTES, ROOM_BYTES, CHECKPOINT_BYTES = 200 << 20, 8 << 20, 20 << 20  # the first is a file system's
PLANTED = str(Path(__file__).with_name("planted.py"))


def undisturbed(scene: Scene) -> None:
    scene.start()
    scene.finish()


def killed(scene: Scene, _: Scene) -> None:
    scene.start()
    scene.in_rollout(2)
    scene.send(signal.SIGKILL)
    scene.wait()
    strike = scene.strike("process", "kill -9 of the process in the rollout of step 2; resume=auto", 2)
    kept = PER_STEP - strike.unfinished
    scene.start("trainer.resume=auto")
    scene.finish()
    scene.must_say(strike, f"step 1: {kept} finished trajectories kept, 0 steps to repeat")
    if [line["rollout/kept"] for line in metrics(scene.run_dir)] != [0, kept, 0, 0]:
        strike.broken.append(f"rollout/kept is not {kept} in step 2 and 0 in all others")


def killed_ahead(scene: Scene, _: Scene) -> None:
    scene.start()
    scene.in_rollout(3)
    scene.send(signal.SIGKILL)
    scene.wait()
    what = "rollout.ahead=1: kill -9 of the process in the rollout of step 3, before the update of step 2; resume=auto"
    strike = scene.strike("process, ahead", what, 3)
    kept = PER_STEP - strike.unfinished
    scene.start("trainer.resume=auto")
    scene.finish()
    scene.must_say(strike, f"step 1: {PER_STEP + kept} finished trajectories kept, 0 steps to repeat")
    if [line["rollout/kept"] for line in metrics(scene.run_dir)] != [0, PER_STEP, kept, 0]:
        strike.broken.append(f"rollout/kept is not {PER_STEP} in step 2, {kept} in step 3 and 0 in all others")
    if [line["staleness"] for line in metrics(scene.run_dir)] != [0, 1, 1, 1]:
        strike.broken.append("not every step but the first learned from the policy of one update earlier")


def stopped(scene: Scene, _: Scene) -> None:
    scene.start()
    scene.in_rollout(2)
    scene.send(signal.SIGTERM)
    strike = scene.strike("SIGTERM", "SIGTERM in the rollout of step 2; resume=auto", 2, unfinished=0)
    status = scene.wait()
    if status != 0 or [folder.name for folder in checkpoint_folders(scene.run_dir)] != ["step_00002", "step_00001"]:
        strike.broken.append(f"exit status {status}, and the newest checkpoint is not that of step 2")
    scene.start("trainer.resume=auto")
    scene.finish()
    scene.must_say(strike, "stopped after step 2, as asked", "step 2: 0 finished trajectories kept, 0 steps to repeat")


def damaged(name: str, how: str, damage: Callable[[Path], None]) -> Callable[[Scene, Scene], None]:
    """The newest checkpoint of a run that is done is no longer what was saved."""

    def act(scene: Scene, reference: Scene) -> None:
        part = scene.run_dir.with_name("part")
        shutil.copytree(reference.run_dir, part)
        part.rename(scene.run_dir)  # the witness takes what it sees for whole
        while scene.witness.done() < LAST:
            time.sleep(0.01)
        newest = checkpoint_folders(scene.run_dir)[0]
        damage(newest / "optimizer.safetensors")
        what = f"{how} the newest checkpoint of a run that is done; resume=auto"
        strike = scene.strike(name, what, LAST, unfinished=0)
        scene.start("trainer.resume=auto")
        scene.finish()
        said = f"checkpoint {newest.name} is passed over, for the one before it"
        scene.must_say(strike, said, "optimizer.safetensors is", f"step_{LAST - 1:05d}, step {LAST - 1}:", "1 steps to repeat")

    return act


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def not_a_number(scene: Scene, _: Scene) -> None:
    """The one fault that changes the run: without step 2's update it must go on as from the weights it had."""
    scene.start(program=(PLANTED, "nan"))
    scene.after_step(2)
    what = "one parameter's gradient is NaN in the backward pass of step 2"
    strike = scene.strike("NaN", what, 2, unfinished=0)
    strike.time = next(when for when, step in scene.witness.steps if step == 2)
    scene.finish()
    one, two, three, four = metrics(scene.run_dir)
    strike.broken += [
        text
        for text, kept in {
            "step 2 does not count one skipped update": two["actor/skipped_updates"] == 1.0,
            "step 2 has no alert not_finite": two.get("alerts/names") == "not_finite",
            "another step was skipped": not any(line["actor/skipped_updates"] for line in (one, three, four)),
            "step 2 changed the weights": three["weights/digest"] == two["weights/digest"],
            "step 3 did not change the weights": four["weights/digest"] != three["weights/digest"],
            "a later step's numbers are not finite": all(
                math.isfinite(value) for line in (three, four) for value in line.values() if isinstance(value, float)
            ),
        }.items()
        if not kept
    ]


def hanging(scene: Scene, _: Scene) -> None:
    scene.start(program=(PLANTED, "hang"))
    scene.in_rollout(2, images=1)
    scene.until(lambda: time.time() - max(one.time for one in scene.witness.finished) > 5, "an engine that hangs")
    strike = scene.strike(
        "engine thread", f"the engine's thread stops in step 2 (rollout.timeout={TIMEOUT['embedded']}); resume=auto", 2
    )
    strike.time = max(one.time for one in scene.witness.finished)
    if (status := scene.wait()) != 1:
        strike.broken.append(f"exit status {status}, expected 1")
    scene.must_say(strike, f"no image for {TIMEOUT['embedded']} s (rollout.timeout): the engine hangs", "go on after step 1")
    scene.start("trainer.resume=auto")
    scene.finish()


def disk_full(scene: Scene, _: Scene) -> None:
    """On a file system of its own: too full for the checkpoint of step 2, then from step 3 on for a single page."""
    disk = scene.folder / "disk"
    disk.mkdir()
    run_dir = disk / "run"
    script = (
        f'mount -t tmpfs -o size={DISK_BYTES} tmpfs {disk} && "$@"; status=$?; cp -a {run_dir} {scene.folder}; exit $status'
    )
    scene.start(f"run_dir={run_dir}", inside=["unshare", "-rm", "sh", "-c", script, "sh"])
    seen = scene.witness.run_dir = Path(f"/proc/{scene.pid}/root{run_dir}")  # the run's mounts are its own
    ballast = seen.parent / "ballast"
    scene.until((seen / "checkpoints" / "step_00001").exists, "the checkpoint of step 1")
    leave(ballast, ROOM_BYTES)
    scene.until(lambda: "the checkpoint of step 2 could not be written" in scene.said(), "a save that fails")
    what = f"tmpfs with {ROOM_BYTES >> 20} MB left while step 2 is saved; room again in step 3"
    first = scene.strike("disk full", what, 2, unfinished=0)
    # Room for one checkpoint: step 4's fails, though its step may be over before the ballast has grown again.
    os.truncate(ballast, ballast.stat().st_size - CHECKPOINT_BYTES)
    scene.until((seen / "checkpoints" / "step_00003").exists, "the checkpoint of step 3")
    leave(ballast, 0)
    status = scene.wait()
    scene.witness.run_dir = scene.run_dir  # where the disk was copied to
    second = scene.strike(
        "disk full", "tmpfs without a free page after step 3, the run ends; room, resume=auto", 4, unfinished=0
    )
    if status != 1:
        second.broken.append(f"exit status {status}, expected 1")
    scene.start("trainer.resume=auto")
    scene.finish()
    third = metrics(scene.run_dir)[2]
    if third.get("alerts/names") != "checkpoint_failed" or "step 2" not in third.get("checkpoint/failed", ""):
        first.broken.append("no alert checkpoint_failed in step 3")


def leave(ballast: Path, size: int) -> None:
    """Fills a file system until only `size` bytes are left, or whatever somebody else takes meanwhile."""
    with ballast.open("wb", buffering=0) as file:
        with suppress(OSError):
            while file.write(bytes(1 << 20)):
                pass
        file.truncate(file.tell() - size)


FAULTS: dict[str, Callable[[Scene, Scene], None]] = {
    "process": killed,
    "SIGTERM": stopped,
    "checkpoint flipped": damaged("checkpoint flipped", "a bit flipped in", flip),
    "checkpoint truncated": damaged("checkpoint truncated", "half cut off a file of", truncate),
    "checkpoint missing": damaged("checkpoint missing", "a file deleted from", Path.unlink),
    "disk full": disk_full,
    "NaN": not_a_number,
    "engine thread": hanging,
}
AHEAD_FAULTS: dict[str, Callable[[Scene, Scene], None]] = {"process, ahead": killed_ahead}  # of runs with AHEAD
AHEAD = ("rollout.ahead=1",)
CHANGES_LATER_STEPS = {"NaN": 1}  # name -> steps before that
