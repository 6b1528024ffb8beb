"""launch=slurm, with stand-ins for Slurm's own programs: everything else, Ray on two nodes included, is real."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from omni_rollout.cli import main
from omni_rollout.config import TrainConfig
from omni_rollout.errors import UserError
from omni_rollout.integrations.slurm import SCRIPT, submit, write_script
from omni_rollout.launch.compose import compose

BASE = ["backend=verl", "launch=slurm", "experiment=nano_ocr"]


def program(folder: Path, name: str, text: str) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def written(run_dir: Path, *overrides: str) -> str:
    words = [*BASE, f"run_dir={run_dir}", *overrides]
    return write_script(compose(words), words).read_text()


def test_the_script_asks_for_what_was_given_and_runs_the_same_run(tmp_path: Path) -> None:
    prompt = 'sampling.negative_prompt="a, $b"'
    asked = ["launch.nodes=2", "launch.gpus_per_node=8", "launch.time=24:00:00", "launch.partition=big", "launch.mem=0"]
    more = ["launch.directives=['qos=high',exclusive]", "launch.setup=['module load cuda']", "launch.max_restarts=5"]
    text = written(tmp_path / "run", *asked, *more, prompt)
    directives = [line.removeprefix("#SBATCH --") for line in text.splitlines() if line.startswith("#SBATCH")]
    for directive in (
        "nodes=2",
        "gpus-per-node=8",
        "time=24:00:00",
        "partition=big",
        "mem=0",
        "qos=high",
        "exclusive",
        "requeue",
    ):
        assert directive in directives
    assert not any(directive.startswith(("account", "cpus-per-task")) for directive in directives), "not asked for"
    assert "\nmodule load cuda\n" in text
    train = text[text.index("train=(") :].partition("\n)")[0]
    assert shlex.split(train.removeprefix("train=(")) == [
        *("omni-rollout", "train", "backend=verl", "experiment=nano_ocr", "launch.max_restarts=5", prompt)
    ]
    assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0


def test_the_folder_keeps_what_was_typed(tmp_path: Path) -> None:
    words = [*BASE, f"run_dir={tmp_path}/a run", "launch.submit=false", "trainer.fit=auto"]
    assert main(["train", *words]) == 0 == main(["train", *words, "trainer.steps=3"])
    typed = (tmp_path / "a run" / "command.txt").read_text().splitlines()
    assert [shlex.split(line)[2:] for line in typed] == [words, [*words, "trainer.steps=3"]]


def test_the_folder_keeps_what_was_typed_where_sbatch_refuses_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    program(tmp_path / "bin", "sbatch", "#!/bin/bash\necho 'invalid partition' >&2; exit 1\n")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    words = [*BASE, f"run_dir={tmp_path}/run", "launch.partition=none"]
    assert main(["train", *words]) == 2
    assert "invalid partition" in capsys.readouterr().err
    assert shlex.split((tmp_path / "run" / "command.txt").read_text())[2:] == words


def test_without_sbatch_the_script_is_there_and_the_error_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    words = [*BASE, f"run_dir={tmp_path / 'run'}"]
    with pytest.raises(UserError, match=rf"sbatch is not on PATH.*{SCRIPT}"):
        submit(write_script(compose(words), words))
    assert (tmp_path / "run" / SCRIPT).is_file()


@pytest.mark.parametrize(
    ("reply", "outcome"), [("echo '42;cluster'", "job 42;"), ("echo 'invalid partition' >&2; exit 1", "invalid partition")]
)
def test_sbatch_is_given_the_script_and_its_reply_is_passed_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], reply: str, outcome: str
) -> None:
    program(tmp_path / "bin", "sbatch", f'#!/bin/bash\necho "$@" > {tmp_path}/given\n{reply}\n')
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    words = [*BASE, f"run_dir={tmp_path / 'run'}"]
    try:
        submit(write_script(compose(words), words))
        said = capsys.readouterr().out
    except UserError as error:
        said = str(error)
    assert outcome in said
    assert (tmp_path / "given").read_text().split() == ["--parsable", str(tmp_path / "run" / SCRIPT)]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("backend=embedded", "give backend=verl"),
        ("trainer.resume=/some/folder", "goes on from its run_dir"),
        ("launch.gpus_per_node=1", "ask for 1"),
    ],
)
def test_what_slurm_cannot_run_is_refused(tmp_path: Path, override: str, message: str) -> None:
    words = [*BASE, f"run_dir={tmp_path}", override]
    config: TrainConfig = compose(words)
    with pytest.raises(UserError, match=message):
        write_script(config, words)
    assert not list(tmp_path.iterdir())


SRUN = """#!/bin/bash
# Runs the command here; what a second Ray node on the same machine needs beside it.
while [[ $1 == --* ]]; do shift; done
[[ " $* " == *" --head "* ]] && more=(--temp-dir="$STAND_IN/r" --min-worker-port=30000 --max-worker-port=30099) ||
    more=(--min-worker-port=30100 --max-worker-port=30199 --dashboard-agent-listen-port=30200 --metrics-export-port=30201)
exec "$@" --object-store-memory=100000000 "${more[@]}"
"""
SCONTROL = """#!/bin/bash
[[ $1 == show ]] && printf '127.0.0.1\\n127.0.0.1\\n' || echo "$@" >> "$STAND_IN/scontrol"
"""
TRAIN = """#!{python}
import os, signal, sys, ray
address = next(word for word in sys.argv if word.startswith("launch.address=")).partition("=")[2]
ray.init(address, log_to_driver=False)
stopped = []
signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))
with open(os.environ["STAND_IN"] + "/trained", "w") as file:
    print(len([node for node in ray.nodes() if node["Alive"]]), *sys.argv[1:], file=file)
while not stopped:
    signal.pause()
with open(os.environ["STAND_IN"] + "/saved", "w") as file:
    print("saved", file=file)
"""


def until(condition: Callable[[], bool], process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < end, log.read_text()[-4000:]
        assert process.poll() is None, log.read_text()[-4000:]
        time.sleep(0.1)


@pytest.mark.slow
def test_the_job_starts_ray_on_all_nodes_and_a_signal_saves_and_requeues(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    folder, bin_ = Path(tempfile.mkdtemp()), tmp_path / "bin"  # short: Ray's sockets lie below, and their paths are limited
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("omni-rollout", TRAIN.format(python=sys.executable))):
        program(bin_, name, text)
    text = written(tmp_path / "run", "launch.nodes=2", f"launch.setup=['export PATH={bin_}:$PATH']")
    environment = {
        **os.environ,
        "STAND_IN": str(folder),
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_CPUS_ON_NODE": "2",
        "SLURM_JOB_END_TIME": str(int(time.time()) + 60),
    }
    log = tmp_path / "log"
    with log.open("wb") as out:
        job = subprocess.Popen(["nice", "bash", "-c", text], env=environment, stdout=out, stderr=out, start_new_session=True)
    children: list[psutil.Process] = []
    try:
        until((folder / "trained").exists, job, log)
        children = psutil.Process(job.pid).children(recursive=True)
        time.sleep(1)
        job.send_signal(signal.SIGTERM)
        assert job.wait(120) == 0, log.read_text()[-4000:]
        assert (folder / "saved").read_text() == "saved\n"
        nodes, *words = (folder / "trained").read_text().split()
        assert nodes == "2"
        assert words[-3:] == [words[-3], "trainer.resume=auto", f"run_dir={tmp_path / 'run'}"]
        assert (folder / "scontrol").read_text() == f"requeue {os.getpid()}\n"
        gone, alive = psutil.wait_procs(children, timeout=60)
        assert gone and not alive, "Ray ends with the job"
    finally:
        if job.poll() is None:
            children += [*psutil.Process(job.pid).children(recursive=True), psutil.Process(job.pid)]
        for process in children:
            if process.is_running():
                process.kill()
        shutil.rmtree(folder, ignore_errors=True)
