"""A run that is stopped, killed or robbed of its newest checkpoint goes on as if nothing had happened, to the last bit."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from omni_rollout.errors import RunFailedError, UserError
from omni_rollout.launch.compose import compose
from omni_rollout.monitor import Monitor
from omni_rollout.policy import checkpoint
from omni_rollout.policy.learner import Learner
from omni_rollout.train import train

STEPS = 5
LIMIT = 300  # seconds; for a busy machine
OF_THE_MACHINE = ("timing_s/", "perf/", "rollout/")


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("a red cat\na blue dog on a table\n")
    return path


@pytest.fixture
def arguments(random_checkpoint: Path, prompts: Path) -> Callable[..., list[str]]:
    return lambda folder, *more: overrides(random_checkpoint, prompts, folder, *more)


def overrides(model: Path, prompts: Path, folder: Path, *more: str) -> list[str]:
    return [
        f"model.path={model}",
        f"prompts={prompts}",
        f"run_dir={folder}",
        "collate.prompt_width=24",
        "sampling.height=64",
        "sampling.width=64",
        "sampling.num_inference_steps=5",
        "reward=jpeg_compressibility",
        "rollout.group_size=8",
        "rollout.prompts_per_step=2",
        "rollout.max_num_seqs=2",
        f"trainer.steps={STEPS}",
        "trainer.learning_rate=1e-3",
        "trainer.engine=deepspeed",
        "trainer.lora_rank=2",
        "trainer.ema_decay=0.9",
        "trainer.updates_per_step=2",
        "trainer.save_every=2",
        "evaluation.images=2",
        "evaluation.every=2",
        "wandb.mode=disabled",
        "threads=1",
        *more,
    ]


@pytest.fixture(scope="module")
def uninterrupted(random_checkpoint: Path, prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    train(compose(overrides(random_checkpoint, prompts, folder)))
    return folder


def lines(folder: Path) -> list[dict[str, float]]:
    path = folder / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def of_the_run(folder: Path) -> list[dict[str, float]]:
    return [{key: value for key, value in line.items() if not key.startswith(OF_THE_MACHINE)} for line in lines(folder)]


def files(folder: Path, *patterns: str) -> dict[str, bytes]:
    found = [path for pattern in patterns for path in folder.rglob(pattern) if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def assert_same_run(folder: Path, other: Path) -> None:
    assert [line["step"] for line in lines(folder)] == list(range(STEPS + 1)), "no step twice, none left out"
    assert of_the_run(folder) == of_the_run(other)
    assert files(folder, "*.png", "seeds.jsonl") == files(other, "*.png", "seeds.jsonl")
    saved = f"checkpoints/step_{STEPS:05d}"
    last, expected = files(folder / saved, "*"), files(other / saved, "*")
    assert len(expected) == 5 and last == expected, [name for name in expected if last.get(name) != expected[name]]
    before = max(path.name for path in (folder / "checkpoints").iterdir() if path.name != f"step_{STEPS:05d}")
    kept = sorted(path.name for path in (folder / "rollout").iterdir())
    assert kept and min(kept) > before, "what was sampled since the checkpoint before the last, should that be damaged"


def interrupt(command: list[str], log: Path, when: Callable[[], object], number: int) -> int:
    """Runs `omni-rollout train`, sends it a signal as soon as `when()`, and returns its exit status."""
    with log.open("wb") as out:
        process = subprocess.Popen([sys.executable, "-m", "omni_rollout.cli", "train", *command], stdout=out, stderr=out)
    try:
        end = time.monotonic() + LIMIT
        while not when():
            assert process.poll() is None and time.monotonic() < end, log.read_text()[-4000:]
            time.sleep(0.005)
        process.send_signal(number)
        return process.wait(LIMIT)
    finally:
        process.kill()


def test_sigterm_in_mid_step_saves_that_step_and_the_run_goes_on(arguments, uninterrupted, tmp_path, capsys):
    folder, log = tmp_path / "run", tmp_path / "log"
    kept = folder / "rollout" / "step_00003"
    assert interrupt(arguments(folder), log, lambda: any(kept.glob("*.safetensors")), signal.SIGTERM) == 0
    done = lines(folder)[-1]["step"]
    assert done == 3, "a step that has begun is finished"
    assert f"stopped after step {done}, as asked; go on after step {done} with" in log.read_text()
    assert (folder / "checkpoints" / f"step_{done:05d}").is_dir(), "whatever save_every says"
    train(compose(arguments(folder, "trainer.resume=auto")))
    assert f"step {done}: 0 finished trajectories kept, 0 steps to repeat" in capsys.readouterr().out
    assert_same_run(folder, uninterrupted)


def test_kill_9_in_mid_rollout_loses_no_finished_trajectory(arguments, uninterrupted, tmp_path, capsys):
    folder, log = tmp_path / "run", tmp_path / "log"
    kept = folder / "rollout" / "step_00004"
    status = interrupt(arguments(folder), log, lambda: len(list(kept.glob("*.safetensors"))) >= 2, signal.SIGKILL)
    assert status == -signal.SIGKILL
    finished = len(list(kept.glob("*.safetensors")))
    assert 2 <= finished < 16 and lines(folder)[-1]["step"] == 3
    torn = next(kept.glob("*.safetensors"))
    torn.write_bytes(torn.read_bytes()[:-1])
    with (folder / "metrics.jsonl").open("a") as metrics:
        metrics.write('{"step": 4, "cut in mid-')
    train(compose(arguments(folder, "trainer.resume=auto")))
    printed = capsys.readouterr().out
    assert f"step_00002, step 2: {16 + finished} finished trajectories kept, 1 steps to repeat" in printed
    assert f"{torn.name} is sampled again, what was kept does not fit" in printed
    assert [line["rollout/kept"] for line in lines(folder)[3:]] == [16, finished - 1, 0]
    assert_same_run(folder, uninterrupted)


def test_a_corrupted_newest_checkpoint_is_passed_over(arguments, uninterrupted, tmp_path, capsys):
    folder = shutil.copytree(uninterrupted, tmp_path / "run")
    newest = folder / "checkpoints" / f"step_{STEPS:05d}" / "optimizer.safetensors"
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    train(compose(arguments(folder, "trainer.resume=auto")))
    printed = capsys.readouterr()
    assert f"step_{STEPS:05d} is passed over, for the one before it" in printed.err and "optimizer.safetensors" in printed.err
    assert "step_00004, step 4: 16 finished trajectories kept, 1 steps to repeat" in printed.out
    assert lines(folder)[-1]["rollout/kept"] == 16, "no trajectory is lost with the checkpoint that held it"
    assert_same_run(folder, uninterrupted)


def test_a_run_folder_is_not_written_over_and_a_finished_run_says_so(arguments, uninterrupted, capsys):
    before = files(uninterrupted, "*")
    with pytest.raises(UserError, match=r"holds a run already: give trainer\.resume=auto"):
        train(compose(arguments(uninterrupted)))
    train(compose(arguments(uninterrupted, "trainer.resume=auto")))
    assert f"all {STEPS} steps are done" in capsys.readouterr().out
    assert files(uninterrupted, "*") == before


def test_a_checkpoint_of_another_folder_brings_its_past_along(arguments, uninterrupted, tmp_path, capsys):
    folder = tmp_path / "elsewhere"
    start = uninterrupted / "checkpoints" / "step_00004"
    train(compose(arguments(folder, f"trainer.resume={start}", "trainer.max_grad_norm=2.0")))
    assert "changed since: trainer.max_grad_norm=1.0 -> 2.0" in capsys.readouterr().out
    assert of_the_run(folder)[:5] == of_the_run(uninterrupted)[:5] and len(lines(folder)) == STEPS + 1
    assert start.is_dir(), "nothing of another run is deleted"


def test_a_full_disk_costs_a_checkpoint_not_the_run(arguments, tmp_path, monkeypatch):
    folder, sync = tmp_path / "run", checkpoint._sync

    def full(path: Path) -> None:
        if "step_00002" in str(path) or "step_00003" in str(path):
            raise OSError(28, "No space left on device")
        sync(path)

    monkeypatch.setattr(checkpoint, "_sync", full)
    with pytest.raises(RunFailedError, match=r"step 3 could not be written.*No space left.*newest one is .*step_00001"):
        train(compose(arguments(folder, "trainer.save_every=1", "trainer.steps=3", "evaluation.images=0")))
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step_00001"]
    assert lines(folder)[-1]["alerts/names"] == "checkpoint_failed" and "step 2" in lines(folder)[-1]["checkpoint/failed"]
    assert len(list((folder / "rollout").glob("*/*.safetensors"))) == 48, "of all steps, for there is one checkpoint alone"


def test_a_step_of_nan_gradients_leaves_weights_average_and_moments_alone(arguments, tmp_path, monkeypatch):
    original = Learner.step

    def poisoned(self: Learner, trajectories: Any, advantages: torch.Tensor, old: Any, step: int) -> Any:
        return original(self, trajectories, advantages * torch.nan if step == 2 else advantages, old, step)

    monkeypatch.setattr(Learner, "step", poisoned)
    train(compose(arguments(tmp_path / "run", "trainer.steps=2", "trainer.save_every=1", "evaluation.images=0")))
    assert [line["actor/skipped_updates"] for line in lines(tmp_path / "run")] == [0, 2]
    assert lines(tmp_path / "run")[1]["alerts/names"] == "not_finite"
    one, two = (files(tmp_path / "run" / "checkpoints" / f"step_0000{step}", "*.safetensors") for step in (1, 2))
    assert len(one) == 4 and one == two


def test_a_signal_before_the_first_step_ends_the_process_at_once(arguments, tmp_path):
    folder = tmp_path / "run"
    assert (
        interrupt(arguments(folder), tmp_path / "log", (folder / "config.yaml").exists, signal.SIGTERM) == 128 + signal.SIGTERM
    )
    assert not lines(folder) and os.listdir(folder / "images") == []


HANG = """
import sys, time
from omni_rollout.cli import main
from omni_rollout.models.base import rollout
original, drawn = rollout.sde_step, []
def step(*args, **kwargs):
    drawn.append(len(args[0]))
    if sum(drawn) > 16 * 5 + 15:  # in the second step of the run
        time.sleep(3600)
    return original(*args, **kwargs)
rollout.sde_step = step
sys.exit(main(["train", *sys.argv[1:]]))
"""


def test_an_engine_that_hangs_ends_the_process_with_the_reason(arguments, tmp_path):
    more = ["trainer.save_every=1", "rollout.timeout=20", "evaluation.images=0"]
    command = [sys.executable, "-c", HANG, *arguments(tmp_path / "run", *more)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT)
    assert done.returncode == 1, done.stderr[-4000:]
    assert "error: no image for 20 s (rollout.timeout): the engine hangs" in done.stderr
    assert "stopped in step 2; go on after step 1 with the same command and trainer.resume=auto" in done.stderr
    assert list((tmp_path / "run" / "rollout" / "step_00002").glob("*.safetensors")), "what was finished is kept"


def test_a_resumed_monitor_knows_what_was_before(arguments, tmp_path):
    config = compose(arguments(tmp_path / "run"))
    gap = {"rollout_corr/logprob_abs_diff/ts_0": 0.5, "rollout_corr/logprob_abs_diff/ts_1": 0.25}
    once, twice = tmp_path / "once", tmp_path / "twice"
    with Monitor(once, config, 2) as monitor:
        monitor.log(1, gap, notes={"seeds/reused": "a"})
        monitor.log(2, gap)
    with Monitor(twice, config, 2) as monitor:
        monitor.log(1, gap, notes={"seeds/reused": "a"})
    with Monitor(twice, config, 2) as monitor:
        assert monitor.lines == 1
        monitor.log(2, gap)
    assert files(once / "images", "*") == files(twice / "images", "*")
    assert lines(once) == lines(twice)
