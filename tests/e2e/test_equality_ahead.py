"""The equality table of rollout.ahead=1: one process does one after the other what verl does at the same time.

`pytest tests/e2e/test_equality_ahead.py -m slow -s` prints it. Each run is a command of its own, as a user would start it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest

pytest.importorskip("verl")

from tests.e2e.test_equality import GRADIENT_NORM, TWO, differences, largest_gap, metrics, run

pytestmark = pytest.mark.slow

AHEAD = ("rollout.ahead=1", "trainer.save_every=1")
OF_THE_BACK_END = ("backend=", "trainer.ranks=", "trainer.engine=")
RUNS: dict[str, tuple[str, ...]] = {
    "verl, 1 rank": ("backend=verl",),
    "verl, 1 rank, LoRA of rank 4, average, an evaluation in between": (
        *("backend=verl", "trainer.lora_rank=4", "trainer.ema_decay=0.9", "evaluation.images=8", "evaluation.every=2"),
    ),
    "verl, 2 ranks, fsdp2": (*TWO, "trainer.engine=fsdp2"),
}


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> Callable[[tuple[str, ...]], Path]:
    """The folder of the embedded run with these overrides, which is made when it is first asked for."""
    return cache(lambda overrides: run(tmp_path_factory.mktemp("embedded") / "process", *AHEAD, *overrides))


@pytest.fixture(scope="module")
def table() -> Iterator[list[str]]:
    rows = ["| run, rollout.ahead=1 | parity | gradient norm | reward | all else | step / (sampling + update) |"]
    rows.append("|---|---|---|---|---|---|")
    yield rows
    print("\n\nAgainst one process that does one after the other:\n\n" + "\n".join(rows))


@pytest.mark.parametrize("name", RUNS)
def test_sampling_ahead_gives_what_one_after_the_other_gives(embedded, table, tmp_path, name):
    reference = embedded(tuple(one for one in RUNS[name] if not one.startswith(OF_THE_BACK_END)))
    folder = run(tmp_path / "verl", *AHEAD, *RUNS[name])
    steps, before = ([line for line in metrics(one) if line["step"]] for one in (folder, reference))
    assert [line["staleness"] for line in steps] == [line["staleness"] for line in before] == [0, 1, 1, 1, 1]
    parity = {(line["parity/bitwise_equal_fraction"], line["parity/ppo_kl_mb0"], line["parity/over_clip"]) for line in steps}
    norms, rewards = (largest_gap(steps, before, key) for key in ("actor/grad_norm", "critic/rewards/mean"))
    different = sorted(differences(folder, reference))
    busy = [line["timing_s/sampling"] + line["timing_s/update"] for line in steps[1:-1]]
    ratio = sum(line["timing_s/step"] for line in steps[1:-1]) / sum(busy)
    same = "equal" if not different else f"{len(different)} differ"
    table.append(f"| {name} | {parity} | {norms:.1e} | {rewards:.1g} | {same} | {ratio:.2f} |")
    assert parity == {(1.0, 0.0, 0.0)} and rewards == 0.0
    assert list((reference / "checkpoints").glob("step_00005/behaviour/*/*.safetensors"))
    assert not different if "1 rank" in name else norms <= GRADIENT_NORM
    assert ratio < 1, "the engine samples while the rank learns"
