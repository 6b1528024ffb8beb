"""`monitor.tensorboard=true`: what a run wrote, read back by TensorBoard itself."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from omni_rollout.config import TrainConfig
from omni_rollout.launch import validate
from omni_rollout.launch.compose import compose
from omni_rollout.monitor import Monitor
from omni_rollout.monitor.tensorboard_sink import FOLDER, TensorboardSink

IMAGE = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
METRICS = {"critic/rewards/mean": 0.5, "parity/bitwise_equal_fraction": 1.0, "actor/grad_norm": math.nan}


def written(run: Path) -> EventAccumulator:
    events = EventAccumulator(str(run / FOLDER), size_guidance={"images": 0, "scalars": 0, "tensors": 0})
    events.Reload()
    return events


def config(run: Path) -> TrainConfig:
    made = compose(["model=nano", "prompts=p.txt", f"run_dir={run}", "wandb.mode=disabled", "wandb.images=2"])
    made.monitor.tensorboard = True
    return made


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    with Monitor(folder, config(folder), 2) as monitor:
        for step in range(3):
            sheet = [("a 7", IMAGE)] * 3
            monitor.log(step, {**METRICS, "critic/rewards/mean": step / 2}, sheet, {"weights/digest": f"d{step}"}, sheet[:1])
            assert len(written(folder).Scalars("alerts")) == step + 1, "on disk when log returns"
        monitor.summary()
    return folder


def test_names_and_numbers_are_those_of_metrics_jsonl(run: Path) -> None:
    events = written(run)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    numbers = {key for line in lines for key, value in line.items() if not isinstance(value, str)} - {"step"}
    texts = {f"{key}/text_summary" for line in lines for key, value in line.items() if isinstance(value, str)}
    assert set(events.Tags()["scalars"]) == numbers
    assert texts | {"config/text_summary", "parity/what_is_compared/text_summary"} <= set(events.Tags()["tensors"])
    for name in numbers:
        for line, event in zip(lines, events.Scalars(name), strict=True):
            assert event.step == line["step"]
            assert event.value == line[name] if line[name] is not None else math.isnan(event.value)
    digests = [event.tensor_proto.string_val[0].decode() for event in events.Tensors("weights/digest/text_summary")]
    assert digests == ["d0", "d1", "d2"]
    (text,) = events.Tensors("config/text_summary")
    assert (run / "config.yaml").read_text() in text.tensor_proto.string_val[0].decode()


def test_images_are_sheets_of_as_many_as_are_asked_for(run: Path) -> None:
    events = written(run)
    assert {"images/training", "images/evaluation"} <= set(events.Tags()["images"])
    sizes = {}
    for name in ("images/training", "images/evaluation"):
        shown = events.Images(name)
        assert [event.step for event in shown] == [0, 1, 2]
        sizes[name] = Image.open(io.BytesIO(shown[-1].encoded_image_string)).width
    assert sizes["images/training"] == 2 * sizes["images/evaluation"], "two images, and one"


def test_the_summary_says_how_to_look(run: Path) -> None:
    assert f"tensorboard --logdir {run}" in (run / "summary.txt").read_text()


def test_a_run_that_goes_on_hides_what_it_does_again(run: Path) -> None:
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:2]))  # the checkpoint was of step 1
    with Monitor(run, config(run), 2) as monitor:
        monitor.log(2, {"critic/rewards/mean": 9.0})
    shown = [(event.step, event.value) for event in written(run).Scalars("critic/rewards/mean")]
    assert shown == [(0, 0.0), (1, 0.5), (2, 9.0)]


def test_a_full_disk_stops_no_run(run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    sink = TensorboardSink(run, 2, "", {}, 0)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sink._writer, "add_scalar", full)
    sink.log(3, METRICS, {})
    sink.log(4, METRICS, {})
    sink.close()
    assert capsys.readouterr().err.count("No space left on device); going on without TensorBoard") == 1


def test_nothing_is_written_and_nothing_imported_unless_it_is_asked_for(tmp_path: Path) -> None:
    plain = config(tmp_path / "run")
    plain.monitor.tensorboard = False
    with Monitor(tmp_path / "run", plain, 1) as monitor:
        monitor.log(1, METRICS)
        monitor.summary()
    assert not (tmp_path / "run" / FOLDER).exists() and "tensorboard" not in (tmp_path / "run/summary.txt").read_text()


def test_without_the_package_it_is_refused_before_anything_is_loaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = config(tmp_path)
    assert not list(validate._guard(asked))
    monkeypatch.setattr(validate, "find_spec", lambda name: None if name == "tensorboard" else object())
    (problem,) = validate._guard(asked)
    assert problem.startswith("monitor.tensorboard=true: the package is not installed: pip install tensorboard")
