"""`make faults` finds what a fault broke: here its judges are shown runs that are wrong, and one that is not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.faults import embedded
from benchmarks.faults.figures import Row, rows_of
from benchmarks.faults.scene import Scene
from omni_rollout.capsule import load_capsule, save_capsule

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
