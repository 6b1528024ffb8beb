"""The equality table: one process, and verl with one and two trainer ranks under every engine, over the same five steps.

Engines of their own or colocated: with as many ranks and the same trainer engine, the runs are one, to the last bit.

`pytest tests/e2e/test_equality.py -m slow -s` prints it. Each run is a command of its own, as a user would start it.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import psutil
import pytest

pytest.importorskip("verl")
pytestmark = pytest.mark.slow

STEPS = 5
LIMIT = 900  # seconds; a busy machine needs several times what a quiet one does
GRADIENT_NORM = 1e-4  # relative; what two ranks may differ by from one, whose sums round elsewhere
TWO = ("backend=verl", "trainer.ranks=2")
APART: dict[str, tuple[str, ...]] = {
    "verl, 1 rank": ("backend=verl",),
    "verl, 2 ranks, ddp": TWO,
    "verl, 2 ranks, fsdp2": (*TWO, "trainer.engine=fsdp2"),
    **{f"verl, 2 ranks, ZeRO {n}": (*TWO, "trainer.engine=deepspeed", f"trainer.zero_stage={n}") for n in (1, 2, 3)},
}
COLOCATED = {
    f"{name}, colocated": (*APART[name], "rollout.placement=colocated")
    for name in ("verl, 1 rank", "verl, 2 ranks, ddp", "verl, 2 ranks, fsdp2", "verl, 2 ranks, ZeRO 3")
}
RUNS = {**APART, **COLOCATED}
OF_THE_MACHINE, KINDS = ("timing_s/", "perf/", "rollout/"), ("images/*.png", "checkpoints/**/*.safetensors")
KL_KEYS = ("parity/ppo_kl_mb0", "parity/kl_nats", "rollout_corr/kl", "rollout_corr/k3_kl", "rollout_corr/logprob_abs_diff_max")


def run(folder: Path, *overrides: str) -> Path:
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
    return folder / "run"


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a run, which is made when it is first asked for."""
    root = tmp_path_factory.mktemp("runs")
    return cache(lambda name: run(root / name.replace(", ", "-").replace(" ", "-"), *RUNS.get(name, ())))


@pytest.fixture(scope="module")
def table() -> Iterator[list[str]]:
    rows = ["| run | log-probs equal to the engine's | KL | gradient norm | reward |", "|---|---|---|---|---|"]
    yield rows
    print("\n\nAgainst the embedded run, over 5 steps, the largest relative difference:\n\n" + "\n".join(rows))


def metrics(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def largest_gap(one: list[dict[str, float]], other: list[dict[str, float]], key: str) -> float:
    return max(abs(a[key] - b[key]) / abs(b[key]) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("name", RUNS)
def test_the_same_five_steps(ran, table, name):
    lines, embedded = metrics(ran(name)), metrics(ran("embedded"))
    assert [line["step"] for line in lines] == [line["step"] for line in embedded] == list(range(1, STEPS + 1))
    equal = min(line["parity/bitwise_equal_fraction"] for line in lines)
    kl = max(abs(line[key]) for line in lines for key in KL_KEYS)
    norms, rewards = (largest_gap(lines, embedded, key) for key in ("actor/grad_norm", "critic/rewards/mean"))
    table.append(f"| {name} | {equal:.0%} | {kl:.1g} | {norms:.1e} | {rewards:.1g} |")
    assert (equal, kl) == (1.0, 0.0)
    assert rewards == 0.0 and norms <= (0.0 if "1 rank" in name else GRADIENT_NORM)


@pytest.mark.parametrize("name", COLOCATED)
def test_colocated_is_the_run_with_engines_of_their_own(ran, name):
    assert not list(differences(ran(name), ran(name.removesuffix(", colocated"))))


def test_colocated_with_one_rank_is_the_embedded_run(ran):
    assert not list(differences(ran("verl, 1 rank, colocated"), ran("embedded")))


def differences(one: Path, other: Path) -> Iterator[str]:
    """Metrics but for times, images, and every tensor of the checkpoint, in every bit."""
    for mine, theirs in zip(metrics(one), metrics(other), strict=True):
        both = [{key: line[key] for key in line if not key.startswith(OF_THE_MACHINE)} for line in (mine, theirs)]
        yield from (f"step {mine['step']}: {key}" for key in both[0].keys() | both[1] if both[0].get(key) != both[1].get(key))
    files = [{path.relative_to(folder): path for kind in KINDS for path in folder.glob(kind)} for folder in (one, other)]
    assert any(path.suffix == ".png" for path in files[0]) and any(path.suffix == ".safetensors" for path in files[0])
    for path in files[0].keys() | files[1]:
        if not (path in files[0] and path in files[1] and files[0][path].read_bytes() == files[1][path].read_bytes()):
            yield str(path)
