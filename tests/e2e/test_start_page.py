"""docs/start.md as it is printed: its files are written, its commands and snippets run, in its order."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.test_readme_commands import COMMAND, ROOT, clone, parses, run, succeeded

__all__ = ["clone"]  # the fixture
PAGE = (ROOT / "docs" / "start.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"^```(\w*)(?: (\S+))?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NOT_RUN = {  # like another that is run; so far as they can be checked without a model
    "omni-rollout rollout checkpoint=runs/first/checkpoints/step_00002 checkpoint_weights=ema prompts=prompts.txt out=best "
    "sampling.sde_type=ode",
    "omni-rollout evaluate experiment=nano_ocr evaluation.images=4 evaluation.prompts=prompts.txt out=before",
    "omni-rollout export runs/first model.dtype=bfloat16 --to lora --out adapter",
}


@pytest.fixture(scope="module")
def done(clone: Path) -> dict[str, subprocess.CompletedProcess[str]]:
    found = {}
    for language, name, text in BLOCK.findall(PAGE):
        if name:
            (clone / name).write_text(text)
        elif language == "python":
            found[text] = run([sys.executable, "-c", text], clone)
        for command in [line for line in text.splitlines() if not language and COMMAND.match(line)]:
            if command not in NOT_RUN:
                found[command] = run(command, clone)
    return found


def test_every_command_and_snippet_of_the_page_works(done: dict[str, subprocess.CompletedProcess[str]]) -> None:
    assert len(done) == 8
    for command, process in done.items():
        succeeded(command, process)
    for command in NOT_RUN:
        assert command in PAGE
        parses(command)


def test_what_the_page_says_of_the_run(done: dict[str, subprocess.CompletedProcess[str]], clone: Path) -> None:
    trained = next(process for command, process in done.items() if "trainer.steps=2" in command)
    folder = clone / "runs" / "first"
    for name in re.findall(r"^\| `([\w./]+)`", PAGE.partition("## Read the run")[2], re.MULTILINE):
        assert (folder / name.replace("XXXX", "0002")).exists(), name
    assert "seed 7, into runs/first" in trained.stdout and "2 prompts x 4 images = 8" in trained.stdout
    summary = (folder / "summary.txt").read_text()
    assert trained.stdout.endswith(summary) and "agreed bit for bit in 2 of 2 steps" in summary
    noise = re.compile(r"Triton|NVML|FlashInfer|Weave|WARNING|it/s|Overriding")
    assert not [line for line in trained.stderr.splitlines() if noise.search(line)]


def test_evaluating_the_checkpoint_gives_the_runs_own_figures(clone: Path, done: dict[str, object]) -> None:
    lines = [json.loads(line) for line in (clone / "runs/first/metrics.jsonl").read_text().splitlines()]
    own = {key: value for key, value in lines[-1].items() if key.startswith("evaluation/") and not key.endswith("_ema")}
    assert own and json.loads((clone / "evaluated/metrics.json").read_text())["metrics"] == own
    index = [json.loads(line) for line in (clone / "sampled/index.jsonl").read_text().splitlines()]
    assert len(index) == 6 and {line["policy_version"] for line in index} == {2}
    assert all((clone / "sampled" / line["file"]).is_file() for line in index) and (clone / "sampled/grid.png").is_file()
