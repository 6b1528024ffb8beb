"""`checkpoint=RUN|STEP`: what it finds, what of it is read, and what a command refuses, all before torch is loaded."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from omni_rollout.cli import main
from omni_rollout.commands import own_words
from omni_rollout.commands.rollout import FROM_RUN, READS
from omni_rollout.errors import UserError
from omni_rollout.launch.compose import compose
from omni_rollout.policy.state import RunState, write_state
from omni_rollout.run.resume import run_state
from omni_rollout.run.source import check_kind, find_source


def run_with(folder: Path, *overrides: str, steps: tuple[int, ...] = (1, 2), kind: str = "full") -> Path:
    (folder / "prompts.txt").write_text('a "1"\n')
    config = compose(["model=nano", f"prompts={folder}/prompts.txt", *overrides])
    for step in steps:
        made = folder / "run" / "checkpoints" / f"step_{step:05d}"
        made.mkdir(parents=True)
        (made / "weights").write_text(str(step))
        write_state(made, kind=kind, run=run_state(config, step=step, weights="w", wandb_id=None, lines={}))
    return folder / "run"


def test_a_run_is_its_newest_whole_checkpoint_and_a_step_is_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_with(tmp_path, steps=(1, 2, 3))
    found = find_source(str(run))
    assert found is not None and found.run.step == 3
    (run / "checkpoints/step_00003/weights").write_text("damaged")
    for copied in ("step_00009.bak", "step_best"):
        shutil.copytree(run / "checkpoints/step_00001", run / "checkpoints" / copied)
    found = find_source(str(run))
    assert found is not None and found.run.step == 2 and "step_00003 is passed over" in capsys.readouterr().err
    named = find_source(str(run / "checkpoints/step_00001"))
    assert named is not None and named.run.step == 1 and named.name.endswith("step_00001, step 1, full weights")
    assert find_source(None) is None


def test_what_is_no_checkpoint_is_said(tmp_path: Path) -> None:
    run = run_with(tmp_path, steps=(1,))
    for given, weights, message in (
        (str(tmp_path / "nowhere"), None, "no such folder; expected a run folder"),
        (str(tmp_path), None, "holds no checkpoint; expected a run folder"),
        (str(run), "best", "checkpoint_weights=best: expected one of policy, ema"),
        (str(run), "ema", "keeps no average"),
        (None, "ema", "of which checkpoint"),
    ):
        with pytest.raises(UserError, match=message):
            find_source(given, weights)
    (run / "checkpoints/step_00001/weights").write_text("damaged")
    with pytest.raises(UserError, match="none of its 1 checkpoints is whole"):
        find_source(str(run))
    source = find_source(str(run / "checkpoints/step_00001"))
    assert source is not None
    with pytest.raises(UserError, match="holds full weights"):
        check_kind(source, "lora")


def test_the_runs_settings_lie_below_what_is_given(tmp_path: Path) -> None:
    trained = ["sampling.height=96", "model.dtype=bfloat16", "sampling.noise_level=0.3", "sampling.extra={layers: 2}"]
    source = find_source(str(run_with(tmp_path, *trained, "rollout.group_size=5", "rollout.max_num_seqs=3", steps=(1,))))
    assert source is not None
    settings = source.settings(FROM_RUN)
    given = ["prompts=p.txt", "sampling.noise_level=0.5"]
    config = compose(given, name="rollout", reads=READS, settings=settings)
    assert (config.sampling.height, config.model.dtype.value, config.rollout.max_num_seqs) == (96, "bfloat16", 3)
    assert (config.sampling.noise_level, config.sampling.width, config.rollout.group_size) == (0.5, 64, 1)
    assert config.sampling.extra == {"layers": 2} and config.prompts == "p.txt" and config.experiment is None
    config = compose(["prompts=p.txt", "sampling.extra.frames=3"], name="rollout", reads=READS, settings=settings)
    assert config.sampling.extra == {"layers": 2, "frames": 3}
    for word in ("model=nano", "experiment=nano_ocr"):
        with pytest.raises(UserError, match=f"{word}: the checkpoint brings the settings of its run"):
            compose([word, "prompts=p.txt"], name="rollout", settings=settings)


def test_the_runs_rewards_take_the_place_of_the_default(tmp_path: Path) -> None:
    source = find_source(str(run_with(tmp_path, "reward=jpeg_compressibility", steps=(1,))))
    assert source is not None
    settings = source.settings(("model", "reward"))
    assert compose(["prompts=p.txt"], settings=settings).reward.weights == {"jpeg_compressibility": 1.0}
    assert compose(["prompts=p.txt", "reward=ocr"], settings=settings).reward.weights == {"ocr": 1.0}
    assert compose(["prompts=p.txt", "reward.weights={ocr: 2.0}"], settings=settings).reward.weights == {"ocr": 2.0}


@pytest.mark.parametrize(
    ("command", "key"),
    [
        (["rollout", "out=o", "prompts=p.txt"], "trainer.resume=runs/a"),
        (["rollout", "out=o", "prompts=p.txt"], "reward=ocr"),
        (["evaluate", "out=o"], "prompts=p.txt"),
        (["evaluate", "out=o"], "rollout.group_size=2"),
        (["parity"], "collate.prompt_width=3"),
        (["replay", "a.safetensors"], "trainer.learning_rate=1"),
        (["export", "--to", "pipeline", "--out", "o", "RUN"], "sampling.height=64"),
    ],
)
def test_a_key_that_a_command_does_not_read_is_an_error(
    command: list[str], key: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = run_with(tmp_path, steps=(1,))
    words = [word.replace("RUN", str(run)) for word in command]
    model = [] if command[0] == "export" else ["model=nano"]
    assert main([*words, *model, key]) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"error: {key}: {command[0]} does not read {key.partition('=')[0]}; it reads model")
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("command", ["rollout", "evaluate", "export"])
def test_nothing_is_written_over_and_that_is_said_before_torch_is_loaded(command: str, tmp_path: Path) -> None:
    run = run_with(tmp_path, steps=(1,))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "kept").write_text("kept")
    words = {
        "rollout": [f"checkpoint={run}", f"prompts={tmp_path}/prompts.txt", f"out={tmp_path}/out"],
        "evaluate": [f"checkpoint={run}", f"out={tmp_path}/out"],
        "export": [str(run), "--to", "pipeline", "--out", f"{tmp_path}/out"],
    }[command]
    code = f"import sys; from omni_rollout.cli import main; print(main({[command, *words]!r}), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "2 False\n" and "is not empty, and nothing is written over" in done.stderr
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["kept"]


def test_own_words() -> None:
    assert own_words(["out=a", "x=1", "out"], ("out", "checkpoint")) == ({"out": "a", "checkpoint": None}, ["x=1", "out"])
    for words, message in ((["out=a", "out=b"], "given twice, as a and b"), (["out="], "out has no value")):
        with pytest.raises(UserError, match=message):
            own_words(words, ("out",))


def test_a_checkpoint_of_another_version_keeps_what_is_still_known(tmp_path: Path) -> None:
    state = RunState(step=1, weights="w", config={"sampling.height": 32, "sampling.gone": 1, "model.path": "m"})
    (tmp_path / "step").mkdir()
    write_state(tmp_path / "step", kind="full", run=state)
    source = find_source(str(tmp_path / "step"))
    assert source is not None
    config = compose(["prompts=p.txt"], name="rollout", settings=source.settings(FROM_RUN))
    assert config.sampling.height == 32 and config.model.path == "m"
