"""`profile=true`: a real run with the real engine, its trace and its table; and the run is the one it would have been."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from omni_rollout.errors import UserError
from omni_rollout.launch.compose import compose
from omni_rollout.launch.progress import Progress
from omni_rollout.launch.validate import validate
from omni_rollout.run.profile import Spent, Stages, StepProfile, table
from omni_rollout.train import train

IMAGES, STEPS = 4, 3
SIZES = [
    "collate.prompt_width=24",
    "sampling.height=32",
    "sampling.width=32",
    f"sampling.num_inference_steps={STEPS}",
    "sampling.true_cfg_scale=2.0",
    "reward=jpeg_compressibility",
    "rollout.group_size=4",
    "rollout.prompts_per_step=1",
    "trainer.steps=3",
    "trainer.micro_batch_size=4",
    "trainer.old_log_probs=recompute",
    "evaluation.images=0",
    "wandb.mode=disabled",
]

PRODUCTS = ("aten::addmm", "aten::mm", "aten::linear", "mkldnn::_linear_pointwise")


def run(checkpoint: Path, folder: Path, *overrides: str) -> list[dict[str, float]]:
    folder.mkdir()
    (folder / "prompts.txt").write_text("a red cat\n")
    where = [f"model.path={checkpoint}", f"prompts={folder / 'prompts.txt'}", f"run_dir={folder / 'run'}"]
    config = compose([*where, *SIZES, *overrides])
    validate(config)
    train(config)
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


def digits(line: dict[str, Any]) -> dict[str, Any]:
    """What no clock has a part in."""
    return {key: value for key, value in line.items() if not key.startswith(("timing_s/", "perf/"))}


def test_one_step_is_traced_in_both_threads_and_told_by_stage(
    random_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = run(random_checkpoint, tmp_path / "profiled", "profile=true")
    folder = tmp_path / "profiled" / "run" / "profile"
    assert sorted(path.name for path in folder.iterdir()) == ["step_00002.md", "step_00002.trace.json.gz"]

    text = (folder / "step_00002.md").read_text()
    assert text in capsys.readouterr().out
    rows = {cells[0]: cells[1:] for cells in ([c.strip() for c in line.strip("|").split("|")] for line in text.splitlines())}
    calls = {name: int(row[2]) for name, row in rows.items() if row[2].isdigit()}
    scored = IMAGES * (STEPS - 1)  # the last step is deterministic
    assert calls["SDE"] == IMAGES * STEPS and calls["encode"] == IMAGES
    assert calls["transformer"] == calls["around the transformer"] >= STEPS  # both guidance branches in one pass
    assert calls["forward"] == calls["backward"] == calls["forward without gradients"] == scored // 4
    assert calls["optimizer"] == calls["scoring"] == 1 <= calls["decode"] <= IMAGES
    stages = [float(row[0]) for name, row in rows.items() if name.startswith("**") and name != "**step**"]
    assert sum(stages) == pytest.approx(float(rows["**step**"][0]), abs=0.01)
    assert float(rows["**step**"][0]) == pytest.approx(lines[1]["timing_s/step"], abs=0.001)

    events = json.loads(gzip.decompress((folder / "step_00002.trace.json.gz").read_bytes()))["traceEvents"]
    threads = {name: {event["tid"] for event in events if event.get("name") == name} for name in ("transformer", "backward")}
    assert all(threads.values()) and not threads["transformer"] & threads["backward"], "the engine has a thread of its own"
    products = {event["tid"] for event in events if event.get("name") in PRODUCTS}
    assert threads["transformer"] | threads["backward"] <= products, "torch's own events of both"

    plain = run(random_checkpoint, tmp_path / "plain")
    assert not (tmp_path / "plain" / "run" / "profile").exists()
    assert [digits(line) for line in plain] == [digits(line) for line in lines], "a profile changes no digit"


def test_verl_and_a_step_before_the_first_are_refused(random_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a red cat\n")
    where = [f"model.path={random_checkpoint}", f"prompts={tmp_path / 'prompts.txt'}", f"run_dir={tmp_path / 'run'}"]
    with pytest.raises(UserError, match=r"profile=true: backend=verl .* give backend=embedded"):
        validate(compose([*where, *SIZES, "backend=verl", "profile=true"]))
    with pytest.raises(UserError, match="profile_step=0: expected at least 1"):
        validate(compose([*where, *SIZES, "profile=true", "profile_step=0"]))


@pytest.mark.parametrize(
    ("overrides", "done", "chosen"),
    [
        ([], 0, None),
        (["profile=true"], 0, 2),
        (["profile=true"], 10, 12),
        (["profile=true", "profile_step=1"], 0, 1),
        (["profile=true", "profile_step=30"], 10, 20),
    ],
)
def test_the_step_is_counted_from_where_the_run_goes_on(overrides: list[str], done: int, chosen: int | None) -> None:
    config = compose(["model.path=x", "prompts=x", "trainer.steps=20", *overrides])
    assert StepProfile(config, done).step == chosen


def test_a_stage_has_its_own_time_alone_and_a_method_is_itself_again(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("omni_rollout.run.profile.time.perf_counter", lambda: now[0])

    class Worker:
        def inner(self) -> None:
            now[0] += 2.0

        def outer(self) -> None:
            now[0] += 1.0
            self.inner()
            self.inner()

    worker, stages = Worker(), Stages()
    with stages.of(worker, "outer", "outer"), stages.of(worker, "inner", lambda: "inner"):
        worker.outer()
    worker.outer()
    assert vars(worker) == {}
    assert stages.spent == {"outer": Spent(1.0, 1), "inner": Spent(4.0, 2)}


def test_a_profile_that_cannot_be_written_does_not_end_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "profile").write_text("in the way")
    profile = StepProfile(compose(["model.path=x", "prompts=x", f"run_dir={tmp_path}", "profile=true"]), 0)
    profile.tell(2, {"timing_s/step": 2.0, "timing_s/update": 1.5}, Progress(shown=False))
    assert "not written: " in capsys.readouterr().out


def test_what_is_left_of_a_rollout_does_not_lose_what_was_decoded_beside_it() -> None:
    spent = {"transformer": Spent(3.0, 10), "decode": Spent(2.0, 1)}
    rows = table(spent, {"timing_s/step": 5.0, "timing_s/rollout": 4.0}).splitlines()
    assert "| what is left of it | 1.000 | 20.0% | | |" in rows and "| **the rest** | 1.000 | 20.0% | | |" in rows
