"""The same run by one process and by verl on Ray: the same numbers, also when an engine dies on the way."""

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
pytestmark = pytest.mark.slow

STEPS = 3
LIMIT = 500  # seconds; a busy machine needs several times what a quiet one does
OF_THE_MACHINE = ("timing_s/", "perf/", "rollout/")


def command(checkpoint: Path, folder: Path, *overrides: str) -> list[str]:
    folder.mkdir(exist_ok=True)
    prompts = folder / "prompts.txt"
    prompts.write_text("a red cat\na blue dog on a table\n")
    return [
        *(sys.executable, "-m", "omni_rollout.cli", "train"),
        f"model.path={checkpoint}",
        f"prompts={prompts}",
        f"run_dir={folder / 'run'}",
        "collate.prompt_width=24",
        "sampling.height=64",
        "sampling.width=64",
        "sampling.num_inference_steps=5",
        "sampling.true_cfg_scale=2.0",
        "reward=jpeg_compressibility",
        "rollout.group_size=4",
        "rollout.prompts_per_step=2",
        "rollout.max_num_seqs=2",
        f"trainer.steps={STEPS}",
        "trainer.learning_rate=1e-3",
        "trainer.ema_decay=0.9",
        "evaluation.images=2",
        "wandb.mode=disabled",
        "threads=1",
        *overrides,
    ]


def lines(folder: Path) -> list[dict[str, float]]:
    path = folder / "run" / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def of_the_run(folder: Path) -> list[dict[str, float]]:
    return [{key: value for key, value in line.items() if not key.startswith(OF_THE_MACHINE)} for line in lines(folder)]


def finish(process: subprocess.Popen[bytes], log: Path) -> None:
    try:
        assert process.wait(LIMIT) == 0, log.read_text()[-4000:]
    finally:
        if process.poll() is None:
            for child in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
                child.kill()


def run(checkpoint: Path, folder: Path, *overrides: str) -> None:
    log = folder.with_suffix(".log")
    with log.open("wb") as out:
        finish(subprocess.Popen(command(checkpoint, folder, *overrides), stdout=out, stderr=out), log)


def kill_a_sampling_engine(process: subprocess.Popen[bytes], folder: Path) -> bool:
    """kill -9, once the first step is done and an engine is in the midst of another."""
    while process.poll() is None:
        if any(line["step"] == 1 for line in lines(folder)):
            for child in psutil.Process(process.pid).children(recursive=True):
                try:
                    title = "".join(child.cmdline())
                except psutil.Error:
                    continue
                if title.startswith("ray::RolloutServer.generate"):
                    child.send_signal(signal.SIGKILL)
                    return True
        time.sleep(0.02)
    return False


@pytest.fixture(scope="module")
def embedded(random_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("one") / "process"
    run(random_checkpoint, folder)
    return folder


def test_two_engines_of_which_one_is_killed_give_the_numbers_of_one_process(random_checkpoint, embedded, tmp_path):
    folder, log = tmp_path / "verl", tmp_path / "verl.log"
    overrides = ["backend=verl", "rollout.workers=2"]
    with log.open("wb") as out:
        process = subprocess.Popen(command(random_checkpoint, folder, *overrides), stdout=out, stderr=out, env={**os.environ})
        killed = kill_a_sampling_engine(process, folder)
        finish(process, log)
    assert killed
    assert lines(folder)[-1]["rollout/retried"] > 0, "the kill came in mid-trajectory"
    assert of_the_run(folder) == of_the_run(embedded)
    assert [line["parity/ppo_kl_mb0"] for line in lines(folder) if line["step"]] == [0.0] * STEPS
    saved = "checkpoints/step_00003/transformer/diffusion_pytorch_model.safetensors"
    assert (folder / "run" / saved).read_bytes() == (embedded / "run" / saved).read_bytes()
