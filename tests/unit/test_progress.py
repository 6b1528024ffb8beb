"""Progress on stderr: lines where there is no terminal, a bar where there is one, and nothing on stdout."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
import time
from pathlib import Path

import pytest

from omni_rollout.config import Width
from omni_rollout.launch import progress
from omni_rollout.launch.compose import compose
from omni_rollout.launch.progress import Progress
from omni_rollout.rollout.start import rollout_line, say_family_defaults

PROGRAM = """
import time
from omni_rollout.launch.progress import Progress
with Progress() as progress:
    progress.stage("loading")
    time.sleep(0.8)
    progress.stage("sampling", 4, "images")
    for _ in progress.track(range(4)):
        time.sleep(0.4)
    progress.say("failed: a [bracket]")
print("the result")
"""


def test_without_a_terminal_there_is_a_line_every_few_seconds_and_stdout_is_the_commands(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "SILENCE", 0.3)
    monkeypatch.setattr(progress, "_LOOK", 0.05)
    done = 0
    with Progress() as shown:
        shown.stage("loading")
        time.sleep(1.0)
        shown.stage("sampling", 8, "steps", count=lambda: done)
        done = 3
        shown.describe("sampling, 1/2 images")
        time.sleep(0.7)
        shown.say("failed: a [bracket]")
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert captured.out == ""
    assert lines[0] == "loading ..." and "failed: a [bracket]" in lines
    assert 1 <= sum(line.startswith("loading: 0:00:0") for line in lines) <= 4
    assert "sampling: 8 steps" in lines
    assert any(line.startswith("sampling, 1/2 images: 3/8 steps, 0:00:0") for line in lines)
    assert "\x1b" not in captured.err


def test_quick_stages_print_no_more_than_their_first_line(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress() as shown:
        shown.stage("scoring", 1000, "capsules")
        assert list(shown.track(range(1000))) == list(range(1000))
    shown.close()
    assert capsys.readouterr().err == "scoring: 1000 capsules\n"


def test_what_is_not_shown_is_not_shown(capsys: pytest.CaptureFixture[str]) -> None:
    hidden = Progress(shown=False)
    hidden.stage("loading")
    hidden.describe("still")
    assert list(hidden.track([1, 2])) == [1, 2]
    hidden.say("a line")
    hidden.close()
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


def test_on_a_terminal_there_is_a_bar_with_counts_and_stdout_is_the_commands() -> None:
    master, slave = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120"}
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        environment.pop(name, None)
    done = subprocess.Popen([sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, stderr=slave, env=environment)
    os.close(slave)
    seen = b""
    while True:
        try:
            part = os.read(master, 4096)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        seen += part
    out, _ = done.communicate(timeout=30)
    os.close(master)
    text = seen.decode()
    assert done.returncode == 0 and out == b"the result\n"
    assert "loading" in text and "━" in text and "3/4 images" in text and "0:00:0" in text
    assert "failed: a [bracket]" in text


def test_the_first_line_says_what_is_sampled_and_where() -> None:
    config = compose(["model=qwen_image", "prompts=p.txt", "rollout.group_size=2"], name="rollout")
    assert rollout_line(config, 1, Path("out")) == (
        "1 prompt x 2 images: 1328x1328, 50 steps, guidance 4, noise 0.7 (sde), at most 256 text tokens, bfloat16; into out"
    )
    config.collate.width = Width.fixed
    assert ", 256 text tokens, bfloat16" in rollout_line(config, 1, Path("out"))


def test_a_path_alone_says_what_nobody_chose(capsys: pytest.CaptureFixture[str]) -> None:
    say_family_defaults(compose(["model=nano", "model.path=folder", "prompts=p.txt"]))
    assert capsys.readouterr().err == ""
    say_family_defaults(compose(["model.path=folder", "prompts=p.txt", "sampling.height=64", "sampling.width=64"]))
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith(
        "folder does not say how it is sampled, so as qwen_image was published: "
        "sampling.num_inference_steps=50 sampling.true_cfg_scale=4; "
    )


def test_a_quiet_stage_is_told_only_when_it_takes_a_while_and_results_are_on_stdout(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "SILENCE", 0.3)
    monkeypatch.setattr(progress, "_LOOK", 0.05)
    with Progress() as shown:
        shown.stage("step 1/2: reward", quiet=True)
        shown.stage("step 1/2: update", quiet=True)
        time.sleep(0.6)
        shown.result("step 1/2  reward 0.5")
    captured = capsys.readouterr()
    assert captured.out == "step 1/2  reward 0.5\n" and "reward" not in captured.err
    assert captured.err.splitlines()[0].startswith("step 1/2: update: 0:00:0")


@pytest.mark.parametrize("verbose", ["0", "1"])
def test_the_libraries_are_quiet_unless_they_are_wanted(verbose: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_SILENT", "TRANSFORMERS_VERBOSITY"):
        monkeypatch.setenv(name, "")  # put back afterwards
        monkeypatch.delenv(name)
    monkeypatch.setenv(progress.VERBOSE, verbose)
    progress.quieten_libraries("owner/name")
    assert ("WANDB_SILENT" in os.environ, "TRANSFORMERS_VERBOSITY" in os.environ) == (verbose == "0",) * 2


def test_deepspeeds_warnings_are_not_among_the_results() -> None:
    """Whoever imports it first sets its logger's level to WARNING and its handler to stdout."""
    code = """
import logging, sys
from omni_rollout.launch.progress import quieten_libraries
quieten_libraries("owner/name")
logger = logging.getLogger("DeepSpeed")
logger.setLevel(logging.WARNING)
logger.addHandler(logging.StreamHandler(sys.stdout))
logger.warning("Setting accelerator to CPU")
logger.error("an error")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "an error\n"
