"""`python -m benchmarks.speed --quick`: every contender, the trainer and the costs, really run on a tiny random model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.speed.contenders import FLOOR, NAMES, SERIAL

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_quick_benchmark_measures_everybody_and_writes_the_page(tmp_path: Path) -> None:
    page, found = tmp_path / "performance.md", tmp_path / "found.json"
    page.write_text("# Performance\n\n<!-- make bench: begin -->\n<!-- make bench: end -->\n")
    command = [sys.executable, "-m", "benchmarks.speed", "--quick", "--docs", str(page), "--json", str(found)]
    done = subprocess.run([*command, "--threads", "1"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    results = json.loads(found.read_text())
    (rollout,), (update,), (costs,) = results["rollout"], results["update"], results["costs"]
    assert set(rollout["seconds"]) == set(NAMES) and all(seconds for seconds in rollout["seconds"].values())
    assert rollout["as_fast_as"][SERIAL][FLOOR]["median"] > 1, "the floor leaves out most of the work"
    (stages,) = results["stages"]
    assert set(stages["stages"]) == {"encode", "transformer", "around the transformer", "SDE", "decode"}
    assert 0 < stages["stages"]["transformer"] < stages["seconds"]["ours, exact"]
    assert set(stages["kernels"]) == {"products", "attention"} and min(stages["kernels"].values()) > 0
    assert "| shape | ours | floor |" in page.read_text()
    assert update["pairs"] == 4 and update["megabytes"] > 0
    assert costs["encoder"] == {"calls": 1, "distinct": 1, "images": 4}, "once for a distinct prompt"
    assert "| tiny | 2 |" in page.read_text() and "called 1 times for 4 images of 1 prompts" in page.read_text()
