"""The equality table: one process, and verl with one and two trainer ranks under every engine, over the same five steps.

Engines of their own or colocated: with as many ranks and the same trainer engine, the runs are one, to the last bit.
And with rollout.ahead=1 the same again, where one process does one after the other what verl does at the same time.

`pytest tests/e2e/test_equality.py -m slow -s` prints both tables. Each run is a command of its own, as a user would start it.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
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
AHEAD = ("rollout.ahead=1", "trainer.save_every=1")
AHEAD_RUNS: dict[str, tuple[str, ...]] = {
    "verl, 1 rank": ("backend=verl",),
    "verl, 1 rank, LoRA of rank 4, average, an evaluation in between": (
        *("backend=verl", "trainer.lora_rank=4", "trainer.ema_decay=0.9", "evaluation.images=8", "evaluation.every=2"),
    ),
    "verl, 2 ranks, fsdp2": (*TWO, "trainer.engine=fsdp2"),
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
    return metrics(folder / "run")


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a run, which is made when it is first asked for."""
    root = tmp_path_factory.mktemp("runs")

    @cache
    def folder(name: str) -> Path:
        made = root / name.replace(", ", "-").replace(" ", "-")
        run(made, *RUNS.get(name, ()))  # "embedded" needs no override
        return made / "run"

    return folder


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


@pytest.fixture(scope="module")
def ahead(tmp_path_factory: pytest.TempPathFactory) -> Callable[[tuple[str, ...]], Path]:
    """The embedded run of the same overrides: its folder."""
    made: dict[tuple[str, ...], Path] = {}

    def folder(overrides: tuple[str, ...]) -> Path:
        same = tuple(one for one in overrides if not one.startswith(("backend=", "trainer.ranks=", "trainer.engine=")))
        if same not in made:
            made[same] = tmp_path_factory.mktemp("ahead") / "process"
            run(made[same], *AHEAD, *same)
        return made[same]

    return folder


@pytest.fixture(scope="module")
def ahead_table() -> Iterator[list[str]]:
    rows = ["| run, rollout.ahead=1 | parity | gradient norm | reward | all else | step / (sampling + learning) |"]
    rows.append("|---|---|---|---|---|---|")
    yield rows
    print("\n\nAgainst one process that does one after the other:\n\n" + "\n".join(rows))


@pytest.mark.parametrize("name", AHEAD_RUNS)
def test_sampling_ahead_gives_what_one_after_the_other_gives(ahead, ahead_table, tmp_path, name):
    reference, folder = ahead(AHEAD_RUNS[name]) / "run", tmp_path / "verl"
    expected = [json.loads(line) for line in (reference / "metrics.jsonl").read_text().splitlines()]
    lines = run(folder, *AHEAD, *AHEAD_RUNS[name])
    steps, before = ([line for line in one if line["step"]] for one in (lines, expected))
    assert [line["staleness"] for line in steps] == [line["staleness"] for line in before] == [0, 1, 1, 1, 1]
    parity = {(line["parity/bitwise_equal_fraction"], line["parity/ppo_kl_mb0"], line["parity/over_clip"]) for line in steps}
    norms, rewards = (largest_gap(steps, before, key) for key in ("actor/grad_norm", "critic/rewards/mean"))
    different = differing(folder / "run", reference, lines, expected)
    busy = [line["timing_s/sampling"] + line["timing_s/update"] for line in steps[1:-1]]
    ratio = sum(line["timing_s/step"] for line in steps[1:-1]) / sum(busy)
    same = ", ".join(different) or "equal"
    ahead_table.append(f"| {name} | {parity} | {norms:.1e} | {rewards:.1g} | {same} | {ratio:.2f} |")
    assert parity == {(1.0, 0.0, 0.0)} and rewards == 0.0
    assert not different if "1 rank" in name else norms <= GRADIENT_NORM
    assert ratio < 1, "the engine samples while the rank learns"


def differing(folder: Path, other: Path, lines: list[dict[str, float]], expected: list[dict[str, float]]) -> list[str]:
    """Metrics, images and checkpoints' tensors that are not the same, bit for bit."""
    found = [
        f"{key} of step {line['step']}"
        for line, wanted in zip(lines, expected, strict=True)
        for key in line.keys() | wanted.keys()
        if not key.startswith((*OF_THE_MACHINE, "alerts")) and line.get(key) != wanted.get(key)
    ]
    patterns = ("images/*.png", f"checkpoints/step_{STEPS:05d}/**/*.safetensors", "seeds.jsonl")
    names = {path.relative_to(other) for pattern in patterns for path in other.glob(pattern)}
    assert any("behaviour" in name.parts for name in names)
    ours, theirs = (read(one, names) for one in (folder, other))
    return found + sorted(str(name) for name in names if ours[name] != theirs[name])


def read(folder: Path, names: Iterable[Path]) -> dict[Path, bytes | None]:
    return {name: (folder / name).read_bytes() if (folder / name).is_file() else None for name in names}
