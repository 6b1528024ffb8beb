"""The same on Ray: a checkpoint of one process goes on on verl, whose ranks may die, and whose driver may be asked to stop."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
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
        "rollout.group_size=4",
        "rollout.prompts_per_step=2",
        "rollout.max_num_seqs=2",
        f"trainer.steps={STEPS}",
        "trainer.learning_rate=1e-3",
        "trainer.ema_decay=0.9",
        "trainer.save_every=1",
        "evaluation.images=2",
        "wandb.mode=disabled",
        "threads=1",
        *overrides,
    ]


def lines(folder: Path) -> list[dict[str, float]]:
    path = folder / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def of_the_run(folder: Path) -> list[dict[str, float]]:
    return [{key: value for key, value in line.items() if not key.startswith(OF_THE_MACHINE)} for line in lines(folder)]


def run(arguments: list[str], log: Path, *events: Callable[[psutil.Process], bool]) -> int:
    """Runs a command; each event is asked again and again until it says that it has happened, then comes the next."""
    with log.open("wb") as out:
        process = subprocess.Popen(arguments, stdout=out, stderr=out)
    left, end = list(events), time.monotonic() + LIMIT
    try:
        while process.poll() is None and time.monotonic() < end:
            if left and left[0](psutil.Process(process.pid)):
                left.pop(0)
            time.sleep(0.005)
        assert not left, log.read_text()[-4000:]
        return process.wait(1)
    finally:
        if process.poll() is None:
            for child in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
                child.kill()


def sampling(folder: Path, step: int) -> bool:
    return any((folder / "rollout" / f"step_{step:05d}").glob("*.safetensors"))


def kill(process: psutil.Process, title: str) -> bool:
    for child in process.children(recursive=True):
        try:
            if "".join(child.cmdline()).startswith(f"ray::{title}"):
                child.send_signal(signal.SIGKILL)
                return True
        except psutil.Error:
            continue
    return False


def gone(processes: list[psutil.Process]) -> bool:
    _, alive = psutil.wait_procs(processes, timeout=30)
    return not alive


def test_from_one_process_to_verl_through_two_deaths_and_a_signal(random_checkpoint, tmp_path):
    whole, folder, log = tmp_path / "whole", tmp_path / "run", tmp_path / "log"
    assert run(command(random_checkpoint, whole), log) == 0
    first = whole / "checkpoints" / "step_00002"
    children: list[psutil.Process] = []

    def rank_killed(process: psutil.Process) -> bool:
        return sampling(folder, 3) and kill(process, "TrainerRank")

    def asked_to_stop(process: psutil.Process) -> bool:
        restarted = (folder / "restarts.jsonl").exists() and (folder / ".stepping").exists() and sampling(folder, 3)
        if restarted:
            children.extend(process.children(recursive=True))
            process.send_signal(signal.SIGTERM)
        return restarted

    onward = command(random_checkpoint, folder, "backend=verl", f"trainer.resume={first}")
    assert run(onward, log, rank_killed, asked_to_stop) == 0, log.read_text()[-4000:]
    text = log.read_text()
    assert "a process of the run died" in text and "restart 1 of 2" in text
    assert "stopped after step 3, as asked; go on after step 3 with" in text
    assert [line["step"] for line in lines(folder)] == [0, 1, 2, 3] and children and gone(children)
    assert lines(folder)[3]["rollout/kept"] > 0 and lines(folder)[3]["perf/restarts"] == 1

    def agent_loop_killed(process: psutil.Process) -> bool:
        return sampling(folder, 4) and kill(process, "AgentLoopWorker")

    onward = command(random_checkpoint, folder, "backend=verl", "trainer.resume=auto")
    assert run(onward, log, agent_loop_killed) == 0, log.read_text()[-4000:]
    assert of_the_run(folder) == of_the_run(whole)
    assert lines(folder)[4]["rollout/kept"] > 0 and lines(folder)[4]["perf/restarts"] == 2
    for name in ("transformer", "ema/transformer"):
        saved = f"checkpoints/step_{STEPS:05d}/{name}/diffusion_pytorch_model.safetensors"
        assert (folder / saved).read_bytes() == (whole / saved).read_bytes()
    optimizer = f"checkpoints/step_{STEPS:05d}/optimizer.safetensors"
    assert (folder / optimizer).read_bytes() == (whole / optimizer).read_bytes()
    assert {path.name for path in (folder / "rollout").iterdir()} == {f"step_{STEPS:05d}"}
