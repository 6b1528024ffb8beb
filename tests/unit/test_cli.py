from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from omni_rollout.cli import main
from omni_rollout.commands import replay
from omni_rollout.errors import UserError
from omni_rollout.launch.paths import recipe_dir
from omni_rollout.types import RequestError

HEAVY = ("torch", "numpy", "hydra", "omegaconf", "diffusers", "vllm", "vllm_omni", "rich", "wandb")


def _loaded_by(statement: str) -> set[str]:
    code = f"import sys\ntry:\n {statement}\nexcept SystemExit: pass\nprint(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stderr.split())


@pytest.mark.parametrize(
    "statement",
    [
        "import omni_rollout",
        "from omni_rollout.cli import main; main(['--help'])",
        "import omni_rollout.types",
    ],
)
def test_help_and_import_load_nothing_heavy(statement: str) -> None:
    assert _loaded_by(statement).isdisjoint(HEAVY)


def test_what_is_sampled_is_said_before_torch_is_loaded() -> None:
    assert _loaded_by("import omni_rollout.rollout.start").isdisjoint({"torch", "transformers", "diffusers", "vllm"})


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
        monkeypatch.setattr("omni_rollout.launch.doctor.doctor", _failing(error))
        assert main(["doctor"]) == 2
    for error in (ValueError("a library's"), json.JSONDecodeError("a library's", "", 0), RuntimeError("a bug's")):
        monkeypatch.setattr("omni_rollout.launch.doctor.doctor", _failing(error))
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
        "import omni_rollout.launch.doctor as d, os, signal, sys, time\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # ignored where the tests run in a shell's background
        "d.doctor = lambda **_: (os.kill(os.getpid(), signal.SIGINT), time.sleep(60))\n"
        "from omni_rollout.cli import main\n"
        "sys.exit(main(['doctor']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ))
    assert (done.returncode, done.stderr) == (128 + signal.SIGINT, "interrupted\n")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--heads", "0"], "heads=0: expected at least 1"),
        (["--layers", "0"], "layers=0: expected at least 1"),
        (["--head-dim", "7"], "head_dim=7: expected an even number"),
        (["--joint-dim", "0"], "joint_dim=0: expected a multiple of 32"),
        (["--seed", "-1"], "seed=-1: expected 0 to 2**63 - 1"),
    ],
)
def test_nano_random_refuses_sizes_that_make_no_model(
    tmp_path: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["nano", "random", "--out", str(tmp_path / "model"), *words]) == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("command", [["random"], ["build"]])
def test_nano_asks_whether_it_can_write_first(command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("kept")
    assert main(["nano", *command, "--out", str(tmp_path / "file" / "model")]) == 2
    assert capsys.readouterr().err == f"error: --out {tmp_path}/file/model: {tmp_path}/file is no folder; give another path\n"
    assert (tmp_path / "file").read_text() == "kept"


def test_nano_build_refuses_no_threads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["nano", "build", "--out", str(tmp_path), "--threads", "0"]) == 2
    assert capsys.readouterr().err == "error: threads=0: expected at least 1\n"


def test_parity_asks_whether_it_can_write_before_it_loads_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from omni_rollout.cli import main\n"
        f"print(main(['parity', 'model=nano', '--json', {str(tmp_path)!r}, '--html', '/proc/p.html']), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "2 False\n"
    assert [line.split(":")[1] for line in done.stderr.splitlines()] == [f" --json {tmp_path}", " --html /proc/p.html"]


def test_replay_checks_numbers_and_takes_a_file_with_an_equals_sign_for_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["replay", "lr=1.safetensors", "model=nano"]) == 2
    assert "no capsule given" in capsys.readouterr().err
    Path("lr=1.safetensors").write_bytes(b"")
    assert main(["replay", "lr=1.safetensors", "model=nano", "trainer.micro_batch_size=0", "sampling.height=17"]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "error: trainer.micro_batch_size=0: expected at least 1",
        "error: sampling.height=17: expected a multiple of 16, from 16 to 65536",
    ]


def test_replay_takes_a_folder_and_says_where_capsules_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "some").mkdir()
    (tmp_path / "run" / "rollout" / "step_00002").mkdir(parents=True)
    for path in ("some/b.safetensors", "some/a.safetensors", "some/grid.png", "run/rollout/step_00002/c.safetensors"):
        (tmp_path / path).touch()
    assert [path.name for path in replay._files(tmp_path / "some")] == ["a.safetensors", "b.safetensors"]
    for folder in ("run", "run/rollout"):
        assert main(["replay", str(tmp_path / folder), "model=nano"]) == 2
        told = f"without *.safetensors files, so without capsules; this run keeps them in {tmp_path}/run/rollout/step_00002"
        assert capsys.readouterr().err == f"error: {tmp_path / folder}: a folder {told}\n"
    (tmp_path / "run/rollout/step_00002/c.safetensors").unlink()
    assert main(["replay", str(tmp_path / "run"), "model=nano"]) == 2
    assert "so without capsules; a run keeps its own in RUN/rollout/step_..." in capsys.readouterr().err


def test_replay_says_what_it_cannot_read_before_torch_is_loaded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole, cut, picture = (tmp_path / name for name in ("whole.safetensors", "cut.safetensors", "x.png"))
    picture.write_bytes(b"\x89PNG")
    save_file({"x": np.zeros(9)}, whole, metadata={"format_version": "2"})
    cut.write_bytes(whole.read_bytes()[:-1])
    words = ["replay", str(picture), str(cut), str(tmp_path / "gone"), "model=nano"]
    code = f"import sys; from omni_rollout.cli import main; print(main({words!r}), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "2 False\n"
    first, second, third = done.stderr.splitlines()
    assert first.startswith(f"error: {picture}: not a readable safetensors file (")
    assert second.startswith(f"error: {cut}: not a readable safetensors file (") and "was it copied whole?" in second
    assert third == f"error: {tmp_path / 'gone'}: no such file"
    replay._tell_unreadable([picture, whole])
    assert capsys.readouterr().err.startswith(f"{picture}: not a readable"), "beside one that is: it is scored"


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("model=nano", "all other keys go before --matrix"),
        ("guidance=nan", "guidance=nan: expected numbers of 0 or more"),
        ("guidance=1.0,inf", "expected numbers of 0 or more"),
        ("guidance=-1", "expected numbers of 0 or more"),
        ("guidance=1,4,1", "guidance=1,4,1: expected each value once"),
        ("guidance=1,1.0", "guidance=1,1.0: expected each value once"),
        ("width=64,64", "width=64,64: expected each value once"),
        ("in_flight=\u00b2", "expected staggered or numbers"),
        ("images=99999999999999999999", "expected 1 or more"),
    ],
)
def test_matrix_words_that_mean_nothing_are_refused(word: str, message: str) -> None:
    from omni_rollout.parity.matrix import Matrix

    with pytest.raises(UserError, match=message):
        Matrix.parse([word])
    with pytest.raises(UserError, match="causes is given twice"):
        Matrix.parse(["causes=true", "causes=false"])


@pytest.mark.parametrize("command", [["train"], ["rollout", "out=rollouts"], ["parity"], ["replay", "a.safetensors"]])
def test_a_checkpoint_without_weights_is_told_before_torch_is_loaded(command: list[str], tmp_path: Path) -> None:
    model = tmp_path / "model"
    for part in (recipe_dir("nano") / "checkpoint").iterdir():
        target = model / part.name
        target.parent.mkdir(exist_ok=True)
        if part.name != "transformer":
            target.symlink_to(part)
    (tmp_path / "prompts.txt").write_text("a\n")
    words = [
        *command,
        f"model.path={model}",
        *([f"prompts={tmp_path}/prompts.txt"] if command[0] in ("train", "rollout") else []),
    ]
    code = f"import sys; from omni_rollout.cli import main; print(main({words!r}), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout == "2 False\n"
    assert done.stderr == f"error: model.path={model}: has no folder transformer/; was it copied whole?\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "prompts.txt"]


def test_the_program_waits_for_threads_calls_what_asked_and_ends_before_modules_are_taken_apart(tmp_path: Path) -> None:
    code = """
import atexit, threading, time
from concurrent.futures import ThreadPoolExecutor
from omni_rollout import cli

class Last:
    def __del__(self):
        print("modules are taken apart")

def main():
    print("main")
    threading.Thread(target=lambda: (time.sleep(0.3), print("a thread"))).start()
    pool.submit(print, "a pool's thread")
    return 3

last, pool = Last(), ThreadPoolExecutor(1)
atexit.register(print, "at exit")
cli.main = main
cli.program()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 3 and not done.stderr
    assert sorted(done.stdout.splitlines()) == ["a pool's thread", "a thread", "at exit", "main"]
    assert done.stdout.splitlines()[-1] == "at exit"


def test_the_program_ends_though_nobody_reads_what_it_says() -> None:
    code = "from omni_rollout import cli; cli.main = lambda: print('x' * 9) or 1; cli.program()"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.wait(60) == 1


def test_a_command_that_sampled_says_nothing_of_libraries(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text('a red sign that says "1"\n')
    words = ["rollout", "model=nano", "prompts=one.txt", "out=out", "sampling.num_inference_steps=2"]
    done = subprocess.run([sys.executable, "-m", "omni_rollout.cli", *words], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["1 image (*.png), its capsule (*.safetensors), index.jsonl and grid.png: out"]
    known = ("1 prompt x ", "weights: ", "loading ", "sampling")
    assert [line for line in done.stderr.splitlines() if not line.startswith(known)] == []


def test_the_true_width_is_measured_unless_certain_cells_are_asked_for() -> None:
    from omni_rollout.parity.matrix import Matrix

    assert Matrix.parse([]).true_width and Matrix.parse(["images=2", "causes=false"]).true_width
    for word in ("dtype=float32", "guidance=1.0", "width=natural", "in_flight=1"):
        assert not Matrix.parse([word, "images=2"]).true_width
        assert Matrix.parse([word, "true_width=true"]).true_width


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a file that is always full")
def test_the_program_does_not_succeed_where_its_output_is_lost() -> None:
    code = "from omni_rollout import cli; cli.main = lambda: print('x' * 9) or 0; cli.program()"
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", code], stdout=full, stderr=subprocess.PIPE, text=True, env=environment)
    assert done.returncode == 120 and "could not be written" in done.stderr


def test_replay_tells_a_checkpoint_and_a_file_of_something_else_from_capsules(tmp_path: Path, capsys) -> None:
    (tmp_path / "step_00001").mkdir()
    (tmp_path / "step_00001" / "state.json").write_text("{}")
    assert main(["replay", str(tmp_path / "step_00001"), "model=nano"]) == 2
    assert f"give it as checkpoint={tmp_path}/step_00001" in capsys.readouterr().err
    weights = next((recipe_dir("nano") / "checkpoint" / "transformer").glob("*.safetensors"))
    assert main(["replay", str(weights), "model=nano"]) == 2
    assert "no capsule, but a safetensors file of something else" in capsys.readouterr().err
