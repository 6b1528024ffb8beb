"""From where a run starts, what is cut off its folder, what is refused, and which checkpoints stay."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from omni_rollout.cli import main
from omni_rollout.config import AlgorithmConfig, DType, ModelConfig, TrainConfig, TrainerConfig
from omni_rollout.errors import RunFailedError, UserError
from omni_rollout.policy import checkpoint
from omni_rollout.policy.tensor_files import pending
from omni_rollout.run.checkpoints import Checkpoints, how_to_go_on
from omni_rollout.run.folder import checkpoint_folders, step_of
from omni_rollout.run.resume import check_weights, enter, run_state
from omni_rollout.run.start import Start, check_has_a_folder, find_start
from omni_rollout.trajectories.journal import Journal


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A policy of one number: what is decided here does not look at it."""
    monkeypatch.setattr(checkpoint, "_weights", lambda folder, policy, weights: [])


def config_of(folder: Path, **trainer: object) -> TrainConfig:
    prompts = folder / "prompts.txt"
    if not prompts.exists():
        prompts.write_text("a cat\n")
    settings = TrainerConfig(**{"steps": 9, "save_every": 1, **trainer})  # pyright: ignore[reportArgumentType]
    return TrainConfig(model=ModelConfig(path="model"), prompts=str(prompts), run_dir=str(folder / "run"), trainer=settings)


def write(folder: Path, config: TrainConfig, step: int) -> None:
    lines = {"metrics.jsonl": step + 1, "seeds.jsonl": 2 * step}
    state = run_state(config, step=step, weights=f"digest {step}", wandb_id="abc", lines=lines)
    checkpoint.save_policy(folder, nn.Linear(1, 1), {}, run=state, optimizer=pending({"step": torch.tensor(step)}))


def lived(folder: Path, *, saved: list[int], logged: int) -> TrainConfig:
    """A run that wrote checkpoints after some steps, and died in the step after `logged`."""
    config = config_of(folder)
    run = Path(config.run_dir)
    run.mkdir()
    (run / "metrics.jsonl").write_text("".join(json.dumps({"step": step}) + "\n" for step in range(logged + 1)) + '{"ste')
    (run / "seeds.jsonl").write_text("".join(f"{number}\n" for number in range(2 * logged + 1)))
    for step in saved:
        write(run / "checkpoints" / f"step_{step:05d}", config, step)
    return config


def resumed(config: TrainConfig, how: str | Path) -> TrainConfig:
    return replace(config, trainer=replace(config.trainer, resume=str(how)))


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_auto_takes_the_newest_that_is_whole_and_cuts_what_came_after(tmp_path, capsys):
    config = lived(tmp_path, saved=[1, 2, 3], logged=5)
    run = Path(config.run_dir)
    flip(run / "checkpoints" / "step_00003" / "rng.safetensors")
    start = find_start(resumed(config, "auto"))
    assert start.step == 2 and start.run is not None and start.run.wandb_id == "abc"
    assert "step_00003 is passed over, for the one before it" in capsys.readouterr().err
    enter(resumed(config, "auto"), start)
    assert [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()] == [0, 1, 2]
    assert (run / "seeds.jsonl").read_text() == "0\n1\n2\n3\n"
    assert "step 2: 0 finished trajectories kept, 3 steps to repeat" in capsys.readouterr().out


def test_auto_without_a_checkpoint_starts_from_the_beginning(tmp_path, capsys):
    config = resumed(lived(tmp_path, saved=[], logged=2), "auto")
    start = find_start(config)
    assert start == Start()
    enter(config, start)
    assert (Path(config.run_dir) / "metrics.jsonl").read_text() == ""
    assert "starts from the beginning, 0 finished trajectories kept, 2 steps to repeat" in capsys.readouterr().out
    assert find_start(resumed(config_of(tmp_path), "auto")) == Start(), "nothing there at all is fine, too"


def test_auto_without_a_run_dir_is_refused_and_the_newest_run_is_named(tmp_path, monkeypatch, capsys):
    """Every start would have a folder named after its second, and begin at step 0 without a word."""
    monkeypatch.chdir(tmp_path)
    words = ["train", "experiment=nano_ocr", "trainer.resume=auto", "dry_run=true"]
    assert main(words) == 2
    told = "error: trainer.resume=auto without run_dir: every start has a new folder, in which there is nothing to go on from; "
    assert capsys.readouterr().err == f"{told}give run_dir=FOLDER (there is no run in runs)\n"
    for age, name in enumerate(("newer", "older")):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "config.yaml").touch()
        os.utime(tmp_path / "runs" / name / "config.yaml", (100 - age, 100 - age))
    assert main(words) == 2
    assert capsys.readouterr().err == f"{told}give run_dir=runs/newer, the newest there is\n"
    clock = "runs/2026-01-02_03-04-05"
    for run_dir, typed in ((clock, [f"run_dir={clock}"]), (clock, [f"++run_dir={clock}"]), ("runs/of_a_file", [])):
        check_has_a_folder(TrainConfig(run_dir=run_dir, trainer=TrainerConfig(resume="auto")), typed)
    check_has_a_folder(TrainConfig(run_dir=clock), [])


def test_none_does_not_write_over_a_run(tmp_path):
    config = lived(tmp_path, saved=[], logged=1)
    with pytest.raises(UserError, match=r"holds a run already: give trainer\.resume=auto"):
        find_start(config)
    assert find_start(replace(config, run_dir=str(tmp_path / "other"))) == Start()


def test_a_named_checkpoint_brings_its_past_and_is_remembered(tmp_path):
    config = lived(tmp_path, saved=[2], logged=4)
    named = Path(config.run_dir) / "checkpoints" / "step_00002"
    other = resumed(replace(config, run_dir=str(tmp_path / "other")), named)
    enter(other, find_start(other))
    assert len((tmp_path / "other" / "metrics.jsonl").read_text().splitlines()) == 3
    assert find_start(other).step == 2, "as long as it has nothing of its own"
    again = find_start(resumed(other, "auto"))
    assert again.checkpoint == named and again.step == 2, "before it has a checkpoint of its own"
    write(tmp_path / "other" / "checkpoints" / "step_00003", other, 3)
    assert find_start(resumed(other, "auto")).step == 3
    with pytest.raises(UserError, match="holds a run already"):
        find_start(other)
    with pytest.raises(UserError, match=r"nowhere/state\.json does not exist"):
        find_start(resumed(config, tmp_path / "nowhere"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lora_rank": 4}, r"trainer\.lora_rank=4: the checkpoint of step 1 has trainer\.lora_rank=0"),
        ({"dtype": DType.bfloat16}, r"model\.dtype=bfloat16: the checkpoint of step 1 has model\.dtype=float32"),
        ({"prompts": "a dog\n"}, r"prompts=.*not the file that the checkpoint of step 1 was trained on"),
    ],
)
def test_what_would_make_it_another_run_is_refused_by_name(tmp_path, change, message):
    config = resumed(lived(tmp_path, saved=[1], logged=1), "auto")
    if "prompts" in change:
        Path(config.prompts).write_text(change["prompts"])
    elif "dtype" in change:
        config = replace(config, model=replace(config.model, **change))
    else:
        config = replace(config, trainer=replace(config.trainer, **change))
    with pytest.raises(UserError, match=message):
        find_start(config)


def test_an_algorithm_that_does_not_sample_with_the_old_policy_is_refused(tmp_path):
    plain = lived(tmp_path, saved=[1], logged=1)
    lagging = replace(plain, algorithm=AlgorithmConfig(name="diffusion_nft"))
    assert find_start(resumed(lagging, "auto")).step == 1, "it starts as its own old policy"
    write(Path(plain.run_dir) / "checkpoints" / "step_00001", lagging, 1)
    assert find_start(resumed(lagging, "auto")).step == 1
    with pytest.raises(
        UserError, match=r"algorithm\.name=flow_grpo: the checkpoint of step 1 is of diffusion_nft, which samples"
    ):
        find_start(resumed(plain, "auto"))


def test_a_named_checkpoint_may_have_any_name(tmp_path):
    config = lived(tmp_path, saved=[1], logged=1)
    shutil.copytree(Path(config.run_dir) / "checkpoints" / "step_00001", tmp_path / "best")
    other = replace(resumed(config, tmp_path / "best"), run_dir=str(tmp_path / "other"))
    enter(other, find_start(other))
    assert how_to_go_on(other.run_dir).startswith(f"go on from {tmp_path / 'best'} with the same command")


def test_evaluations_up_to_the_checkpoint_come_along_with_the_images_that_later_ones_are_compared_with(tmp_path):
    config = lived(tmp_path, saved=[1], logged=2)
    here = Path(config.run_dir)
    (here / "evaluation_start.npz").write_bytes(b"images of the start")
    lines = [f'{{"step": {step}, "index": {index}}}\n' for step in (0, 1, 2) for index in (0, 1)]
    (here / "evaluation.jsonl").write_text("".join(lines))
    other = replace(resumed(config, str(here / "checkpoints" / "step_00001")), run_dir=str(tmp_path / "other"))
    for again in (other, resumed(config, "auto")):
        enter(again, find_start(again))
        assert (Path(again.run_dir) / "evaluation_start.npz").read_bytes() == b"images of the start"
        assert (Path(again.run_dir) / "evaluation.jsonl").read_text() == "".join(lines[:4])


def test_what_changed_is_told_and_another_model_is_noticed(tmp_path, capsys):
    config = resumed(lived(tmp_path, saved=[1], logged=1), "auto")
    config = replace(config, trainer=replace(config.trainer, learning_rate=1e-5, steps=20))
    start = find_start(config)
    enter(config, start)
    printed = capsys.readouterr().out.splitlines()
    assert printed[1:] == [
        "changed since: trainer.learning_rate=0.0001 -> 1e-05",
        "changed since: trainer.steps=9 -> 20",
    ]
    check_weights(start, "digest 1")
    with pytest.raises(UserError, match=r"model at model\.path is another"):
        check_weights(start, "digest 2")


@settings(deadline=None, max_examples=25)
@given(saves=st.lists(st.integers(1, 12), min_size=1, max_size=8), keep=st.integers(0, 4))
def test_after_a_save_the_newest_stay_and_nothing_lies_beyond_it(tmp_path_factory, saves, keep):
    config = config_of(tmp_path_factory.mktemp("run"), keep_checkpoints=keep)
    checkpoints = Checkpoints(config, Journal(config.run_dir))
    line: list[int] = []
    for step in saves:
        checkpoints.save(step, lambda folder, step=step: write(folder, config, step))
        line = [*(before for before in line if before < step), step][-keep if keep else 0 :]
        assert [step_of(folder) for folder in checkpoint_folders(config.run_dir)] == line[::-1]


def test_a_save_that_fails_is_told_once_and_only_a_last_one_fails_the_run(tmp_path, capsys):
    config = config_of(tmp_path)
    checkpoints = Checkpoints(config, Journal(config.run_dir))

    def full(folder: Path) -> None:
        raise OSError(28, "No space left on device")

    checkpoints.save(1, lambda folder: write(folder, config, 1))
    checkpoints.save(2, full)
    assert "step 2 could not be written" in capsys.readouterr().err
    assert "No space left" in checkpoints.notes()["checkpoint/failed"] and checkpoints.notes() == {}
    with pytest.raises(RunFailedError, match=r"newest one is .*step_00001\. Make room"):
        checkpoints.check()
    checkpoints.save(3, lambda folder: write(folder, config, 3))
    checkpoints.check()


@pytest.mark.parametrize(("every", "expected"), [(0, [9]), (1, list(range(1, 10))), (4, [4, 8, 9])])
def test_when_a_checkpoint_is_due(tmp_path, every, expected):
    checkpoints = Checkpoints(config_of(tmp_path, save_every=every), Journal(tmp_path))
    assert [step for step in range(1, 10) if checkpoints.due(step)] == expected
    assert all(checkpoints.due(step, stopping=True) for step in range(1, 10))
