"""`make faults` finds what a fault broke: here its judges are shown runs that are wrong, and one that is not."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest

from benchmarks.faults import embedded, on_ray
from benchmarks.faults.figures import Row, rows_of
from benchmarks.faults.scene import Scene
from omni_rollout.launch.compose import compose
from omni_rollout.trajectories.capsule import load_capsule, save_capsule
from omni_rollout.types import Prompt

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def reference(random_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Scene:
    with Scene(tmp_path_factory.mktemp("reference"), random_checkpoint, "embedded") as scene:
        embedded.undisturbed(scene)
    return scene


@pytest.fixture(scope="module")
def killed(reference: Scene, random_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Scene:
    with Scene(tmp_path_factory.mktemp("killed"), random_checkpoint, "embedded") as scene:
        embedded.killed(scene, reference)
    return scene


def only_row(scene: Scene, reference: Scene) -> Row:
    (row,) = rows_of(scene, reference)
    return row


def test_a_killed_process_costs_what_was_unfinished(killed, reference):
    row = only_row(killed, reference)
    assert row.good, row
    assert 11 <= row.finished == row.kept < 16 and row.finished + row.unfinished == 16 and row.repeated == 0


def weights_of_another_step(folder: Path) -> None:
    rewrite(folder, lambda line: {**line, "weights/digest": "0" * 64} if line["step"] == 3 else line)


def a_log_prob_of_other_bits(folder: Path) -> None:
    rewrite(folder, lambda line: {**line, "parity/bitwise_equal_fraction": 0.99} if line["step"] == 3 else line)


def a_step_twice(folder: Path) -> None:
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join([*lines, lines[-1]]))


def a_request_twice(folder: Path) -> None:
    lines = (folder / "seeds.jsonl").read_text().splitlines(keepends=True)
    (folder / "seeds.jsonl").write_text("".join([*lines, lines[0]]))


def other_weights_in_the_checkpoint(folder: Path) -> None:
    path = folder / "checkpoints/step_00004/transformer/diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\1")


def rewrite(folder: Path, change: Callable[[dict[str, object]], dict[str, object]]) -> None:
    path = folder / "metrics.jsonl"
    path.write_text("".join(json.dumps(change(json.loads(line))) + "\n" for line in path.read_text().splitlines()))


@pytest.mark.parametrize(
    ("damage", "found"),
    [
        (weights_of_another_step, ("differences", "mixed")),
        (a_log_prob_of_other_bits, ("differences", "mixed")),
        (a_step_twice, ("differences", "not_once")),
        (a_request_twice, ("differences", "not_once")),
        (other_weights_in_the_checkpoint, ("differences",)),
    ],
)
def test_what_is_wrong_with_a_run_is_found(killed, reference, tmp_path, monkeypatch, damage, found):
    monkeypatch.setattr(killed, "run_dir", shutil.copytree(killed.run_dir, tmp_path / "run"))
    damage(killed.run_dir)
    row = only_row(killed, reference)
    assert not row.good
    assert [name for name in ("differences", "not_once", "mixed", "broken") if getattr(row, name)] == list(found)


def test_a_trajectory_that_is_sampled_again_or_by_another_policy_is_found(killed, reference, tmp_path, monkeypatch):
    strike, first = killed.strikes[0], killed.witness.finished[0]
    again = replace(first, time=strike.time + 0.1)
    monkeypatch.setattr(killed.witness, "finished", [*killed.witness.finished, again])
    row = only_row(killed, reference)
    assert row.finished - row.kept == 1 and not row.good
    other = replace(load_capsule(first.copy), policy_version=7)
    save_capsule(other, tmp_path / "other.safetensors")
    monkeypatch.setattr(killed.witness, "finished", [replace(first, copy=tmp_path / "other.safetensors")])
    assert only_row(killed, reference).mixed == [f"{first.request_id} was sampled by version 7, not by the policy of its step"]


@pytest.mark.timeout(1800)
def test_a_process_with_an_engine_and_a_rank_that_is_killed_takes_all_back_to_the_checkpoint(random_checkpoint, tmp_path):
    pytest.importorskip("verl")
    faults = on_ray.FAULTS["colocated"]
    with Scene(tmp_path / "reference", random_checkpoint, "colocated") as reference:
        on_ray.undisturbed(reference)
    with Scene(tmp_path / "killed", random_checkpoint, "colocated") as scene:
        on_ray.many(scene, faults)
    rows = rows_of(scene, reference)
    assert [row.fault for row in rows] == list(faults)
    for row in rows:
        assert row.good and row.repeated == 0 and row.kept == row.finished, row


def test_a_reward_worker_that_was_killed_scores_again(random_checkpoint, tmp_path):
    ray = pytest.importorskip("ray")
    pytest.importorskip("verl")
    from omni_rollout.integrations.verl.launch import verl_config
    from omni_rollout.integrations.verl.records import adopt
    from omni_rollout.integrations.verl.reward import RewardWorkers, to_score

    (tmp_path / "prompts.txt").write_text("a red cat")
    overrides = [f"model.path={random_checkpoint}", f"prompts={tmp_path / 'prompts.txt'}", "reward=jpeg_compressibility"]
    config = verl_config(compose(overrides))
    adopt(config)
    image = np.zeros((64, 64, 3), dtype=np.uint8)
    sample: Any = SimpleNamespace(image=image, prompt=Prompt(text="a red cat"))
    ray.init(num_cpus=4, include_dashboard=False, object_store_memory=128 << 20)
    try:
        workers = RewardWorkers(config=config)
        worker = workers.reward_loop_workers[0]
        before = ray.get(worker.compute_score.remote(to_score(sample)))
        titles = {child: " ".join(child.cmdline()) for child in psutil.Process().children(recursive=True)}
        (process,) = [child for child, title in titles.items() if title.startswith("ray::RewardLoopWorker")]
        process.kill()
        process.wait()
        assert score_again(ray, worker, to_score(sample)) == before
    finally:
        ray.shutdown()


def score_again(ray: Any, worker: Any, sample: Any) -> Any:
    """Once Ray has noticed the death, and started the worker again."""
    end = time.monotonic() + 120
    while True:
        try:
            return ray.get(worker.compute_score.remote(sample))
        except ray.exceptions.RayActorError:
            assert time.monotonic() < end, "it does not come back"
            time.sleep(0.5)
