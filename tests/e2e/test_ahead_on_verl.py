"""`rollout.ahead=1` on verl: killed while it samples ahead and learns, it goes on to what an undisturbed process gives."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

pytest.importorskip("verl")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

STEPS = 4
LIMIT = 900  # seconds; a busy machine needs several times what a quiet one does
OF_THE_MACHINE = ("timing_s/", "perf/", "rollout/")


def command(checkpoint: Path, folder: Path, *overrides: str) -> list[str]:
    prompts = folder.parent / "prompts.txt"
    prompts.write_text("a red cat\na blue dog on a table\n")
    return [
        *(sys.executable, "-m", "omni_rollout.cli", "train"),
        f"model.path={checkpoint}",
        f"prompts={prompts}",
        f"run_dir={folder}",
        "collate.prompt_width=24",
        "sampling.height=64",
        "sampling.width=64",
        "sampling.num_inference_steps=5",
        "reward=jpeg_compressibility",
        "rollout.ahead=1",
        "rollout.group_size=4",
        "rollout.prompts_per_step=2",
        "rollout.max_num_seqs=2",
        f"trainer.steps={STEPS}",
        "trainer.learning_rate=1e-3",
        "trainer.schedule=constant",
        "trainer.warmup_steps=0",
        "trainer.save_every=1",
        "evaluation.images=2",
        "evaluation.every=2",
        "wandb.mode=disabled",
        "threads=1",
        *overrides,
    ]


def lines(folder: Path) -> list[dict[str, float]]:
    path = folder / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def of_the_run(folder: Path) -> list[dict[str, float]]:
    return [{key: value for key, value in line.items() if not key.startswith(OF_THE_MACHINE)} for line in lines(folder)]


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
