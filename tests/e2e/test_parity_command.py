"""`omni-rollout parity` and `replay` as a user calls them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from omni_rollout.models import families
from omni_rollout.nano.random_weights import build_random

ROOT = Path(__file__).parents[2]


def command(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "omni_rollout.cli", *words], capture_output=True, text=True, timeout=400, check=False
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("random")
    build_random(folder, layers=2, seed=5)
    return folder


def test_parity_says_zero_and_exits_0(model, tmp_path):
    out = tmp_path / "parity.json"
    matrix = [
        "dtype=bfloat16",
        "guidance=4.0",
        "width=natural,64",
        "in_flight=3",
        "images=3",
        "causes=false",
    ]
    done = command("parity", f"model.path={model}", "--json", str(out), "--html", str(tmp_path / "p.html"), "--matrix", *matrix)
    assert done.returncode == 0, done.stderr
    cells = json.loads(out.read_text())["cells"]
    assert len(cells) == 2
    for cell in cells:
        assert cell["kl"] == 0.0 and cell["bitwise_equal_fraction"] == 1.0 and cell["max_abs_diff"] == 0.0
    assert "<svg" in (tmp_path / "p.html").read_text()


@pytest.mark.parametrize("family", families())
def test_a_family_without_a_path_is_a_random_model_of_it(family, tmp_path):
    out = tmp_path / "parity.json"
    matrix = ["dtype=bfloat16", "guidance=4.0", "width=natural", "in_flight=3", "images=3", "causes=false"]
    done = command("parity", f"model.family={family}", "--json", str(out), "--matrix", *matrix)
    assert done.returncode == 0, done.stdout + done.stderr
    ((cell,), name) = (json.loads(out.read_text())[key] for key in ("cells", "model"))
    assert name == f"a random {family}" and cell["kl"] == 0.0 and cell["bitwise_equal_fraction"] == 1.0


def test_replay_tells_capsules_that_hold_from_those_that_do_not(model, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red cat\n")
    sizes = ["sampling.height=64", "sampling.width=64", "sampling.num_inference_steps=4", "collate.prompt_width=24"]
    rolled = command(
        "rollout",
        f"model.path={model}",
        f"prompts={tmp_path / 'prompts.txt'}",
        f"out={tmp_path / 'out'}",
        "rollout.group_size=2",
        *sizes,
    )
    assert rolled.returncode == 0, rolled.stderr
    capsules = sorted((tmp_path / "out").glob("*.safetensors"))
    held = command("replay", str(tmp_path / "out"), f"model.path={model}")
    assert held.returncode == 0 and "2 of 2 capsules hold bit for bit" in held.stdout, held.stdout + held.stderr
    (tmp_path / "broken.safetensors").write_bytes(capsules[0].read_bytes()[:100])
    other = tmp_path / "other"
    build_random(other, layers=2, seed=6)
    mixed = command("replay", *map(str, capsules), str(tmp_path / "broken.safetensors"), f"model.path={other}")
    assert mixed.returncode == 1
    assert mixed.stdout.count("different  2 capsules, from ") == 1 and mixed.stdout.count("refused  ") == 1
    assert mixed.stderr.startswith(f"{tmp_path}/broken.safetensors: not a readable safetensors file"), "at once"


def test_a_wrong_word_is_one_line(model):
    done = command("parity", f"model.path={model}", "--matrix", "dtyp=bfloat16")
    assert done.returncode == 2 and done.stderr.startswith("error: ") and "dtype" in done.stderr
    assert command("replay", "model=nano").returncode == 2


@pytest.mark.slow
def test_make_exact_finds_every_cell_exact(tmp_path):
    words = ["-m", "benchmarks.exact", "--quick", "--docs", "none", "--json", str(tmp_path / "exact.jsonl")]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=550, cwd=ROOT)
    results = [json.loads(line) for line in (tmp_path / "exact.jsonl").read_text().splitlines()]
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(results) == 4 and all(found["exact"] == found["cells"] > 0 for found in results)
    assert {found["instruction_set"] for found in results} >= {"torch AVX2, oneDNN AVX2"}
