from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from omni_rollout.cli import main
from omni_rollout.errors import UserError
from omni_rollout.types import RequestError

HEAVY = ("torch", "numpy", "hydra", "omegaconf", "diffusers", "vllm", "vllm_omni", "rich", "wandb")


def _loaded_by(statement: str) -> set[str]:
    code = f"import sys\ntry:\n {statement}\nexcept SystemExit: pass\nprint(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stderr.split())


@pytest.mark.parametrize(
    "statement", ["import omni_rollout", "from omni_rollout.cli import main; main(['--help'])", "import omni_rollout.types"]
)
def test_help_and_import_load_nothing_heavy(statement: str) -> None:
    assert _loaded_by(statement).isdisjoint(HEAVY)


def test_a_wrong_key_is_told_before_torch_is_loaded() -> None:
    loaded = _loaded_by("from omni_rollout.cli import main; main(['train', 'trainer.stps=1'])")
    assert "hydra" in loaded and "torch" not in loaded


@pytest.mark.parametrize("command", [["train"], ["rollout"], ["nano", "build"], ["nano", "random"]])
def test_every_command_shows_an_example_of_itself(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main([*command, "--help"])
    assert exit_.value.code == 0
    assert f"  omni-rollout {' '.join(command)} " in capsys.readouterr().out


def test_a_user_error_is_lines_on_stderr_and_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "model=nano", "prompts=/nowhere.txt", "trainer.steps=-1"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert lines and all(line.startswith("error: ") for line in lines)
    assert "error: trainer.steps=-1: expected at least 0" in lines and "error: prompts=/nowhere.txt: no such file" in lines


def test_the_traceback_is_there_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMNI_ROLLOUT_TRACEBACK", "1")
    with pytest.raises(ValueError, match="no such key"):
        main(["train", "trainer.stps=1"])


def _failing(error: Exception) -> Callable[..., int]:
    def doctor(*, fix: bool) -> int:
        raise error

    return doctor


def test_only_this_packages_errors_lose_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    for error in (UserError("given"), RequestError("given")):
        monkeypatch.setattr("omni_rollout.doctor.doctor", _failing(error))
        assert main(["doctor"]) == 2
    for error in (ValueError("a library's"), json.JSONDecodeError("a library's", "", 0), RuntimeError("a bug's")):
        monkeypatch.setattr("omni_rollout.doctor.doctor", _failing(error))
        with pytest.raises(type(error)):
            main(["doctor"])


@pytest.mark.parametrize("words", [["prompts=a.txt"], ["prompts=a.txt", "out="], ["out=a", "out=b"]])
def test_rollout_needs_one_out(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["rollout", *words]) == 2
    assert capsys.readouterr().err.startswith("error: out ")


def test_nano_random_writes_a_checkpoint_of_the_size_asked_for(tmp_path: Path) -> None:
    out = tmp_path / "model"
    command = ["nano", "random", "--out", str(out), "--layers", "1", "--heads", "2", "--head-dim", "16", "--joint-dim", "32"]
    assert main([*command, "--seed", "3"]) == 0
    config = json.loads((out / "transformer" / "config.json").read_text())
    shape = (config["num_layers"], config["num_attention_heads"], config["attention_head_dim"], config["joint_attention_dim"])
    assert shape == (1, 2, 16, 32)


def test_interrupting_ends_with_130_and_one_line() -> None:
    code = (
        "import omni_rollout.doctor as d, os, signal, sys, time\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # ignored where the tests run in a shell's background
        "d.doctor = lambda **_: (os.kill(os.getpid(), signal.SIGINT), time.sleep(60))\n"
        "from omni_rollout.cli import main\n"
        "sys.exit(main(['doctor']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ))
    assert (done.returncode, done.stderr) == (128 + signal.SIGINT, "interrupted\n")
