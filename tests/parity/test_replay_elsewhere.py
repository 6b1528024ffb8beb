"""`replay` of capsules from another machine: what it says, and the exit status of each answer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from omni_rollout.config import TrainConfig
from omni_rollout.parity import reported
from omni_rollout.parity.measure import measure
from omni_rollout.parity.replay import Replayed, other_machine
from omni_rollout.trajectories.capsule import load_capsule, save_capsule
from omni_rollout.types import Trajectory

ELSEWHERE = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
Answer = tuple[int, list[dict[str, Any]], str]


@pytest.fixture(scope="module")
def foreign(checkpoint: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A capsule sampled with fewer instructions and one thread."""
    folder = tmp_path_factory.mktemp("elsewhere")
    (folder / "prompts.txt").write_text("a red cat\n")
    words = [
        "rollout",
        f"model.path={checkpoint}",
        "model.dtype=bfloat16",
        f"prompts={folder / 'prompts.txt'}",
        f"out={folder / 'out'}",
    ]
    words += ["threads=1", "rollout.group_size=1", "sampling.height=64", "sampling.width=64", "collate.prompt_width=64"]
    done = subprocess.run(
        [sys.executable, "-m", "omni_rollout.cli", *words, "sampling.num_inference_steps=4", "sampling.true_cfg_scale=4.0"],
        capture_output=True,
        text=True,
        timeout=400,
        env={**os.environ, **ELSEWHERE},
    )
    assert done.returncode == 0, done.stderr
    (capsule,) = (folder / "out").glob("*.safetensors")
    return capsule


@pytest.fixture
def replayed(checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., Answer]:
    def replayed(*capsules: Path, threads: int = 2) -> Answer:
        config = TrainConfig()
        config.model.path, config.threads = checkpoint, threads
        status = reported.replay(capsules, config, json_path=tmp_path / "replay.json")
        return status, json.loads((tmp_path / "replay.json").read_text())["capsules"], capsys.readouterr().out

    return replayed


def changed(capsule: Path, path: Path, gap: float, **machine: Any) -> Path:
    """The same with its first log-prob moved by `gap`, or by one bit if that is 0, and a machine of other fields."""
    trajectory = load_capsule(capsule)
    log_probs = trajectory.log_probs.clone()
    if gap:
        log_probs[0] += gap
    else:
        log_probs.view(torch.int32)[0] ^= 1
    fingerprint = {**trajectory.fingerprint, "machine": {**trajectory.fingerprint["machine"], **machine}}
    save_capsule(replace(trajectory, log_probs=log_probs, fingerprint=fingerprint), path)
    return path


@pytest.fixture(scope="module")
def own(foreign: Path, checkpoint: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same record with the log-probs of this machine, as it is with two threads."""
    from omni_rollout.parity.replay import Scorer

    torch.set_num_threads(2)
    trajectory = load_capsule(foreign)
    config = TrainConfig()
    config.model.path = checkpoint
    scorer = Scorer(config, "bfloat16")
    fingerprint = {**trajectory.fingerprint, "machine": scorer.machine}
    path = tmp_path_factory.mktemp("own") / "own.safetensors"
    save_capsule(replace(trajectory, log_probs=scorer._log_probs(trajectory), fingerprint=fingerprint), path)
    return path


def test_what_another_machine_rounds_otherwise_is_within(foreign, own, replayed, tmp_path):
    status, (result,), out = replayed(foreign)
    if result["status"] == "equal":  # here the bits happen to agree: then the record must say otherwise
        assert status == 0
        status, (result,), out = replayed(changed(own, tmp_path / "bit.safetensors", 0, threads=1))
    assert (status, result["status"]) == (3, "within"), out
    assert 0 < result["max_abs_diff"] <= result["explained"] < 0.05
    assert "another machine: " in out and "threads (1, here 2)" in out and "within what rounding explains (up to" in out


def test_the_instruction_set_and_the_thread_count_are_named(foreign):
    there = load_capsule(foreign).fingerprint["machine"]
    assert there["threads"] == 1 and there["instruction_set"] == "torch AVX2, oneDNN AVX2"
    words = other_machine(there, {**there, "instruction_set": "torch AVX512, oneDNN AVX512_CORE", "threads": 2, "kernels": "x"})
    assert [word.split()[0] for word in words] == ["instruction_set", "threads"]


def test_a_gap_that_no_rounding_makes_is_outside(own, replayed, tmp_path):
    tampered = changed(own, tmp_path / "tampered.safetensors", 0.5, threads=1)
    status, (result,), out = replayed(tampered)
    assert (status, result["status"]) == (4, "outside") and "outside what rounding explains" in out


def test_on_its_own_machine_the_same_gap_does_not_hold(own, replayed, tmp_path):
    assert replayed(own)[0] == 0
    for gap in (0.5, 0):
        status, (result,), out = replayed(changed(own, tmp_path / "tampered.safetensors", gap))
        assert (status, result["status"], result["other_machine"]) == (1, "different", []) and "another machine" not in out


def test_equal_bits_are_equal_whatever_the_machine(own, replayed, tmp_path):
    trajectory: Trajectory = load_capsule(own)
    machine = {**trajectory.fingerprint["machine"], "device": "a stranger", "kernels": "y"}
    path = tmp_path / "stranger.safetensors"
    save_capsule(replace(trajectory, fingerprint={**trajectory.fingerprint, "machine": machine}), path)
    status, (result,), _ = replayed(path)
    assert (status, result["status"]) == (0, "equal")


def test_an_older_capsule_without_a_machine_is_told_so(own, replayed, tmp_path):
    trajectory = load_capsule(changed(own, tmp_path / "bit.safetensors", 0))
    fingerprint = {name: value for name, value in trajectory.fingerprint.items() if name != "machine"}
    path = tmp_path / "older.safetensors"
    save_capsule(replace(trajectory, fingerprint=fingerprint), path)
    status, (result,), out = replayed(path)
    assert (status, result["status"]) == (3, "within") and "another machine: which one, the capsule does not say" in out


def test_the_worst_answer_decides_the_status(own, replayed, tmp_path):
    within = changed(own, tmp_path / "within.safetensors", 0, threads=1)
    outside = changed(own, tmp_path / "outside.safetensors", 0.5, threads=1)
    different = changed(own, tmp_path / "different.safetensors", 0)
    assert replayed(own, within)[0] == 3
    assert replayed(own, within, outside)[0] == 4
    assert replayed(within, outside, different)[0] == 1


def test_other_weights_are_no_matter_of_the_machine(own, replayed, tmp_path):
    trajectory = load_capsule(changed(own, tmp_path / "within.safetensors", 0, threads=1))
    path = tmp_path / "weights.safetensors"
    save_capsule(replace(trajectory, fingerprint={**trajectory.fingerprint, "weights": "0" * 64}), path)
    status, (result,), _ = replayed(path)
    assert (status, result["status"]) == (1, "different") and result["not_honoured"]


def test_capsules_of_other_weights_are_one_line_and_weights_that_were_not_kept_are_told(tmp_path):
    def other(path: Path, version: int) -> Replayed:
        found = measure([trajectory], [trajectory.log_probs + 0.5], 1e-3)
        return Replayed(path=path, measure=found, not_honoured=(f"weights ({version}, here 9)",), other_version=version)

    trajectory: Any = SimpleNamespace(log_probs=torch.zeros(3), latents=torch.zeros(4, 2, 2))
    run, elsewhere = tmp_path / "run", Path("sampled")
    (run / "checkpoints" / "step_00003").mkdir(parents=True)
    results = [other(run / f"rollout/step_0000{step}/{name}.safetensors", step) for step in (2, 3) for name in "abc"]
    folders = [run / "rollout" / f"step_0000{step}" for step in (2, 3)]
    assert list(reported._lines(results)) == [
        f"different  3 capsules, from {folder}/a.safetensors to {folder}/c.safetensors: by up to 0.5, KL up to -0.5; "
        f"not honoured: weights ({folder.name[-1]}, here 9)"
        for folder in folders
    ]
    (line,) = reported._lines(results[:1])
    assert line.startswith(f"different  {results[0].path}: by up to 0.5")
    results.append(other(elsewhere / "d.safetensors", 4))
    told = "capsules were sampled with other weights than these, after step"
    lost = f"those were not kept, there is no {run}/checkpoints/step_00002; trainer.save_every=1 keeps them, "
    lost += "the newest trainer.keep_checkpoints of them"
    assert set(reported._sampled_by_others(results)) == {
        f"3 {told} 2 of their run: {lost}",
        f"3 {told} 3 of their run: give checkpoint={run}/checkpoints/step_00003",
        f"1 {told} 4 of their run: give checkpoint=RUN/checkpoints/step_00004",
    }
