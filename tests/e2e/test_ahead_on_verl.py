"""`rollout.ahead=1` on verl: killed while it samples ahead and learns, it goes on to what an undisturbed process gives."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from tests.e2e.test_verl_resume import LIMIT, STEPS, lines, of_the_run
from tests.e2e.test_verl_resume import command as command_of_a_run

pytest.importorskip("verl")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

AHEAD = ("rollout.ahead=1", "trainer.schedule=constant", "trainer.warmup_steps=0", "evaluation.every=2")


def command(checkpoint: Path, folder: Path, *overrides: str) -> list[str]:
    return command_of_a_run(checkpoint, folder, *AHEAD, *overrides)


def start(arguments: list[str], log: Path) -> subprocess.Popen[bytes]:
    with log.open("ab") as out:
        return subprocess.Popen(arguments, stdout=out, stderr=out)


def everything(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    root = psutil.Process(process.pid)
    return [root, *root.children(recursive=True)]


def finished(process: subprocess.Popen[bytes], log: Path) -> None:
    try:
        assert process.wait(LIMIT) == 0, log.read_text()[-4000:]
    finally:
        if process.poll() is None:
            for child in everything(process):
                child.kill()


def test_killed_while_it_samples_ahead(random_checkpoint, tmp_path):
    whole, folder, log = tmp_path / "whole", tmp_path / "run", tmp_path / "log"
    finished(start(command(random_checkpoint, whole), log), log)
    process, end = start(command(random_checkpoint, folder, "backend=verl"), log), time.monotonic() + LIMIT
    sampled_ahead = folder / "rollout" / "step_00003"
    while not (any(sampled_ahead.glob("*.safetensors")) and lines(folder)[-1]["step"] == 1):
        assert process.poll() is None and time.monotonic() < end, log.read_text()[-4000:]
        time.sleep(0.005)
    there = everything(process)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    psutil.wait_procs(there, timeout=90)
    kept = len(list(sampled_ahead.glob("*.safetensors")))
    finished(start(command(random_checkpoint, folder, "backend=verl", "trainer.resume=auto"), log), log)
    assert f"step 1: {8 + kept} finished trajectories kept, 0 steps to repeat" in log.read_text()
    assert [line["staleness"] for line in lines(folder) if line["step"]] == [0, 1, 1, 1]
    assert [line["rollout/kept"] for line in lines(folder) if line["step"]] == [0, 8, kept, 0]
    assert of_the_run(folder) == of_the_run(whole)
    for name in ("transformer", "behaviour/transformer"):
        saved = f"checkpoints/step_{STEPS:05d}/{name}/diffusion_pytorch_model.safetensors"
        assert (folder / saved).read_bytes() == (whole / saved).read_bytes()
