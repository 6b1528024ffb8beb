"""The equality table: one process, and verl with one and two trainer ranks under every engine, over the same five steps.

`pytest tests/e2e/test_equality.py -m slow -s` prints it. Each run is a command of its own, as a user would start it.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

pytest.importorskip("verl")
pytestmark = pytest.mark.slow

STEPS = 5
LIMIT = 900  # seconds; a busy machine needs several times what a quiet one does
GRADIENT_NORM = 1e-4  # relative; what two ranks may differ by from one, whose sums round elsewhere
TWO = ("backend=verl", "trainer.ranks=2")
RUNS: dict[str, tuple[str, ...]] = {
    "verl, 1 rank": ("backend=verl",),
    "verl, 2 ranks, ddp": TWO,
    "verl, 2 ranks, fsdp2": (*TWO, "trainer.engine=fsdp2"),
    **{f"verl, 2 ranks, ZeRO {n}": (*TWO, "trainer.engine=deepspeed", f"trainer.zero_stage={n}") for n in (1, 2, 3)},
}
KL_KEYS = ("parity/ppo_kl_mb0", "parity/kl_nats", "rollout_corr/kl", "rollout_corr/k3_kl", "rollout_corr/logprob_abs_diff_max")


def run(folder: Path, *overrides: str) -> list[dict[str, float]]:
    """A reward that is read, not measured: a last bit of a weight seldom changes it, so what follows stays comparable."""
    folder.mkdir()
    command = [
        *(sys.executable, "-m", "omni_rollout.cli", "train", "experiment=nano_ocr", f"run_dir={folder / 'run'}"),
        *("rollout.group_size=8", f"trainer.steps={STEPS}", "evaluation.images=0", "wandb.mode=disabled", "threads=1"),
        *overrides,
    ]
    log = folder / "log"
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out)
    try:
        assert process.wait(LIMIT) == 0, log.read_text()[-4000:]
    finally:
        if process.poll() is None:
            for child in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
                child.kill()
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, float]]:
    return run(tmp_path_factory.mktemp("one") / "process")


@pytest.fixture(scope="module")
def table() -> Iterator[list[str]]:
    rows = ["| run | log-probs equal to the engine's | KL | gradient norm | reward |", "|---|---|---|---|---|"]
    yield rows
    print("\n\nAgainst the embedded run, over 5 steps, the largest relative difference:\n\n" + "\n".join(rows))


def largest_gap(one: list[dict[str, float]], other: list[dict[str, float]], key: str) -> float:
    return max(abs(a[key] - b[key]) / abs(b[key]) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("name", RUNS)
def test_the_same_five_steps(embedded, table, tmp_path, name):
    lines = run(tmp_path / "verl", *RUNS[name])
    assert [line["step"] for line in lines] == [line["step"] for line in embedded] == list(range(1, STEPS + 1))
    equal = min(line["parity/bitwise_equal_fraction"] for line in lines)
    kl = max(abs(line[key]) for line in lines for key in KL_KEYS)
    norms, rewards = (largest_gap(lines, embedded, key) for key in ("actor/grad_norm", "critic/rewards/mean"))
    table.append(f"| {name} | {equal:.0%} | {kl:.1g} | {norms:.1e} | {rewards:.1g} |")
    assert (equal, kl) == (1.0, 0.0)
    assert rewards == 0.0 and norms <= (0.0 if "1 rank" in name else GRADIENT_NORM)
