"""Every command of README.md as it is printed: run, or, where that cannot be, listed with the reason and checked so far."""

from __future__ import annotations

import itertools
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image

from omni_rollout import load_capsule
from omni_rollout.cli import _parser
from omni_rollout.errors import UserError
from omni_rollout.launch.compose import compose
from omni_rollout.launch.validate import validate

ROOT = Path(__file__).parents[2]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"^(?:[A-Z_]+=\S+ )*(?:omni-rollout|make|python3?|pip|git|source|\.venv/bin/\w+)(?: |$)")
PLACEHOLDERS = {  # what a reader puts in their place
    "--json FILE": "--json written.json",
    "--html FILE": "--html written.html",
    "prompts=FILE": "prompts=recipes/nano/data/heldout.jsonl",
    "experiment=...": "experiment=nano_ocr",
    "--out DIR": "--out made",
    "checkpoint=RUN": "checkpoint=runs/mine",
    "export RUN": "export runs/mine",
    "report RUN": "report runs/mine",
}


def composes(command: str) -> None:
    """Parsed, composed and validated as `train` does before it loads anything."""
    parsed = _parser().parse_args(shlex.split(command)[1:])
    try:
        validate(compose(parsed.overrides))
    except UserError as error:  # that a model is not on this machine is no fault of the command
        missing = re.compile(r"model\.path=\S+: not in the hub's cache")
        assert all(missing.match(line) for line in str(error).splitlines()), error


def parses(command: str) -> None:
    _parser().parse_args(shlex.split(command)[1:])


def makes(command: str) -> None:
    """`make -n`: the target is there, and so are its parts."""
    done = subprocess.run(command.replace("make", "make -n", 1), shell=True, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout, done.stderr


def selects(command: str) -> None:
    """The marker is one that pytest knows, and tests carry it."""
    marker = command.rpartition(" -m ")[2]
    assert f'"{marker}: ' in (ROOT / "pyproject.toml").read_text()
    assert any(f"pytest.mark.{marker}" in path.read_text() for path in ROOT.glob("tests/*/*.py"))


@dataclass(frozen=True)
class NotRun:
    reason: str
    check: Callable[[str], None]


A_RUN = "needs a run; docs/start.md has the like, which is run"
NOT_RUN = {  # as it is printed, with its placeholders filled in -> why not, and what is checked instead
    "make demo": NotRun("installs, then trains for minutes", makes),
    "make test": NotRun("runs this test", makes),
    "make equality": NotRun("half an hour of trainings", makes),
    "make bench": NotRun("an hour; its quick form is tested by itself", makes),
    "make memory": NotRun("half an hour and 8 GiB", makes),
    "make exact": NotRun("half an hour; its quick form is tested by itself", makes),
    "make faults": NotRun("half an hour of kills", makes),
    "EXTRA=cuda make doctor": NotRun("installs the build for CUDA", makes),
    ".venv/bin/pytest -m gpu": NotRun("needs a CUDA device", selects),
    "omni-rollout train experiment=nano_ocr trainer.steps=30 rollout.max_num_seqs=8": NotRun("trains for minutes", composes),
    "omni-rollout train experiment=nano_ocr trainer.fit=auto": NotRun("trains for minutes; test_fit.py", composes),
    "omni-rollout train experiment=nano_ocr profile=true": NotRun("trains for minutes; test_profile.py", composes),
    "omni-rollout train backend=verl experiment=nano_ocr rollout.workers=2 trainer.ranks=2 trainer.engine=fsdp2": NotRun(
        "trains for minutes, on Ray", composes
    ),
    "omni-rollout train backend=verl experiment=nano_ocr rollout.placement=colocated trainer.ranks=2 "
    "trainer.engine=fsdp2": NotRun("trains for minutes, on Ray; test_equality.py", composes),
    "omni-rollout train backend=verl experiment=nano_ocr rollout.ahead=1": NotRun(
        "trains for minutes, on Ray; test_equality_ahead.py", composes
    ),
    "omni-rollout train backend=verl launch=slurm launch.nodes=2 launch.gpus_per_node=8 experiment=nano_ocr": NotRun(
        "needs Slurm", composes
    ),
    "omni-rollout train experiment=qwen_image_ocr_lora trainer.micro_batch_size=1 "
    "prompts=recipes/nano/data/heldout.jsonl": NotRun("needs a GPU, and Qwen-Image", composes),
    "omni-rollout rollout checkpoint=runs/mine prompts=recipes/nano/data/heldout.jsonl out=sampled": NotRun(A_RUN, parses),
    "omni-rollout evaluate checkpoint=runs/mine out=evaluated": NotRun(A_RUN, parses),
    "omni-rollout export runs/mine --to pipeline --out exported": NotRun(A_RUN, parses),
    "omni-rollout report runs/mine": NotRun(A_RUN, parses),
    "omni-rollout serve model=nano": NotRun("serves until it is stopped: test_serve.py", parses),
    "omni-rollout train experiment=nano_ocr rollout.url=http://127.0.0.1:8091": NotRun("needs the server", composes),
    "omni-rollout reward serve mine.py:bright --port 8300": NotRun("serves until it is stopped: test_extending.py", parses),
    "omni-rollout nano build --out made": NotRun("trains for half an hour", parses),
    "omni-rollout doctor --fix": NotRun("may uninstall packages of the environment that these tests run in", parses),
    "omni-rollout parity model=nano": NotRun("minutes; it is run with both options", parses),
    "omni-rollout parity model=nano --json written.json": NotRun("minutes; it is run with both options", parses),
    "omni-rollout parity model=nano --html written.html": NotRun("minutes; it is run with both options", parses),
}
SLOW = ("omni-rollout parity", "omni-rollout doctor")  # run as printed, but only where there is time
STATUS = {  # command -> what else it may end with, by its documentation
    "omni-rollout plan": {1},  # what was asked for does not fit
    "omni-rollout parity": {1},  # the bits differ on this machine: a finding, which other tests are about
}


def printed(text: str) -> Iterator[str]:
    """The commands of the text's fenced blocks, without their comments."""
    for _, block in FENCE.findall(text):
        for line in block.splitlines():
            if COMMAND.match(line):
                yield re.sub(r"\s+#.*", "", line).strip()


def variants(command: str) -> Iterator[str]:
    """Every reading of a printed command: each `[option]` left out and put in, each of `a|b`, placeholders filled in."""
    parts = re.split(r"(\[[^]]*\]|\b\w+\|\w+\b)", command)
    readings = [("", part[1:-1]) if part.startswith("[") else tuple(part.split("|")) for part in parts]
    for chosen in itertools.product(*readings):
        reading = " ".join("".join(chosen).split())
        for placeholder, value in PLACEHOLDERS.items():
            reading = reading.replace(placeholder, value)
        yield reading


def left_open(command: str) -> list[str]:
    return re.findall(r"\.\.\.|(?<![\w=])[A-Z]{3,}\b(?!=)|=[A-Z]{3,}\b|[\[\]|]", command)


README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [reading for command in printed(README) for reading in variants(command)]
RUN = [command for command in COMMANDS if command not in NOT_RUN]
QUICK = [command for command in RUN if not command.startswith(SLOW)]
SNIPPETS = [block for language, block in FENCE.findall(README) if language == "python"]


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that looks like the clone, but into which commands may write, with `omni-rollout` on its path."""
    folder = tmp_path_factory.mktemp("clone")
    (folder / "recipes").symlink_to(ROOT / "recipes")
    (folder / "bin").mkdir()
    program = folder / "bin" / "omni-rollout"
    program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m omni_rollout.cli "$@"\n')
    program.chmod(0o755)
    return folder


def run(command: str | Sequence[str], clone: Path) -> subprocess.CompletedProcess[str]:
    words = ["bash", "-c", command] if isinstance(command, str) else [*command]
    path = f"{clone / 'bin'}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)}
    return subprocess.run(words, cwd=clone, env=environment, capture_output=True, text=True, timeout=550, check=False)


@pytest.fixture(scope="module")
def done(clone: Path) -> dict[str, subprocess.CompletedProcess[str]]:
    """Two at a time: the rollout and what reads it in the README's order, and all the rest."""
    chain = [command for command in QUICK if "rollouts" in command]
    rest = [command for command in QUICK if command not in chain]

    def one(commands: Sequence[str]) -> dict[str, subprocess.CompletedProcess[str]]:
        return {command: run(command, clone) for command in commands}

    def snippets() -> dict[str, subprocess.CompletedProcess[str]]:
        return {code: run([sys.executable, "-c", code], clone) for code in SNIPPETS}

    with ThreadPoolExecutor(2) as pool:
        found = [pool.submit(one, chain), pool.submit(snippets), pool.submit(one, rest)]
        return {command: process for future in found for command, process in future.result().items()}


def succeeded(command: str, process: subprocess.CompletedProcess[str]) -> None:
    allowed = {0}.union(*(more for start, more in STATUS.items() if command.startswith(start)))
    assert process.returncode in allowed and "Traceback" not in process.stderr, process.stdout + process.stderr


@pytest.mark.parametrize("command", QUICK)
def test_what_is_printed_works(command: str, done: dict[str, subprocess.CompletedProcess[str]]) -> None:
    succeeded(command, done[command])


@pytest.mark.slow
@pytest.mark.parametrize("command", [command for command in RUN if command not in QUICK])
def test_what_is_printed_works_and_takes_minutes(command: str, clone: Path) -> None:
    succeeded(command, run(command, clone))


@pytest.mark.parametrize("command", [command for command in COMMANDS if command in NOT_RUN])
def test_what_cannot_be_run_here_is_right_as_far_as_it_goes(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("omni_rollout.launch.validate.constants.HF_HUB_OFFLINE", True)
    NOT_RUN[command].check(command)


def test_every_command_is_found_and_every_placeholder_filled() -> None:
    assert len(QUICK) >= 4 and len(SNIPPETS) == 1
    assert not {command: left_open(command) for command in COMMANDS if left_open(command)}
    assert not set(NOT_RUN) - set(COMMANDS), "listed as not run, but no longer in the README"
    assert len(list(re.finditer(r"^```", README, re.MULTILINE))) == 2 * len(FENCE.findall(README))


def test_readings() -> None:
    assert list(variants("omni-rollout doctor [--fix]")) == ["omni-rollout doctor", "omni-rollout doctor --fix"]
    assert list(variants("omni-rollout nano a|b --out DIR")) == [
        "omni-rollout nano a --out made",
        "omni-rollout nano b --out made",
    ]
    assert list(printed("```\nEXTRA=cuda make a   # why\nstep 1/80  reward\n```\n")) == ["EXTRA=cuda make a"]
    assert left_open("omni-rollout rollout prompts=FILE CAPSULE... [--x]") == ["=FILE", "CAPSULE", "...", "[", "]"]
    assert not left_open("EXTRA=cuda make doctor") and not left_open("omni-rollout train experiment=nano_ocr")


def test_the_python_snippet_works(clone: Path, done: dict[str, subprocess.CompletedProcess[str]]) -> None:
    succeeded("", done[SNIPPETS[0]])
    assert len(list(clone.glob("sign-*.safetensors"))) == 4


def test_the_first_rollout_is_of_the_models_own_size(clone: Path, done: dict[str, subprocess.CompletedProcess[str]]) -> None:
    command = next(command for command in QUICK if command.startswith("omni-rollout rollout"))
    prompts = len((ROOT / "recipes/nano/data/heldout.jsonl").read_text().splitlines())
    images, capsules = sorted((clone / "rollouts").glob("*-*.png")), sorted((clone / "rollouts").glob("*.safetensors"))
    assert len(images) == len(capsules) == prompts
    assert {Image.open(path).size for path in images} == {(64, 64)}
    spec = load_capsule(capsules[0]).spec
    assert (spec.height, spec.width, spec.num_inference_steps, spec.guided, spec.prompt_width) == (64, 64, 10, False, 16)
    told = done[command].stderr.splitlines()
    words = "64x64, 10 steps, no guidance, noise 0.7 (sde), 16 text tokens, float32"
    assert told[0] == f"{prompts} prompts x 1 image: {words}; into rollouts"
    assert told[1].startswith("weights: ") and told[2] == "loading torch and the engine ..."
    assert f"sampling, 0/{prompts} images: {prompts * 10} steps" in told
    assert not [line for line in told if "WARNING" in line or "Triton" in line or "Loading weights" in line]
    stdout = f"{prompts} images (*.png), their capsules (*.safetensors), index.jsonl and grid.png: rollouts\n"
    assert done[command].stdout == stdout  # progress is no result
