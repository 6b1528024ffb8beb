"""`rollout.max_num_seqs=auto`: the number is the fastest that was measured, and no bit depends on it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from omni_rollout.config import TrainConfig
from omni_rollout.data.collate import Collator
from omni_rollout.errors import UserError
from omni_rollout.launch.compose import compose
from omni_rollout.launch.validate import validate, validate_rollout
from omni_rollout.rollout.choice import make_engine
from omni_rollout.rollout.engine import RolloutEngine
from omni_rollout.rollout.in_flight import MOST, best, calibrate, climb, told
from omni_rollout.types import Prompt, Trajectory


def auto(checkpoint: Path, *overrides: str) -> TrainConfig:
    sizes = ["sampling.height=32", "sampling.width=32", "sampling.num_inference_steps=4", "collate.prompt_width=16"]
    return compose(
        [f"model.path={checkpoint}", "sampling.true_cfg_scale=2.0", *sizes, "rollout.max_num_seqs=auto", *overrides],
        unused=["prompts"],
    )


@pytest.fixture(scope="module")
def engine(random_checkpoint: Path) -> Iterator[RolloutEngine]:
    with make_engine(auto(random_checkpoint)) as engine:
        yield engine


def test_an_engine_made_with_auto_has_measured_and_takes_the_best(engine: RolloutEngine, random_checkpoint: Path) -> None:
    assert engine.pipeline.steps > 10, "steps that were taken before anything was asked for"
    assert 1 <= engine.max_num_seqs <= MOST
    engine.max_num_seqs = 3
    found = calibrate(engine, auto(random_checkpoint))
    assert engine.max_num_seqs == best(found) != 3
    assert list(found) == [2**power for power in range(len(found))] and all(speed > 0 for speed in found.values())
    assert f"in flight: {best(found)} (" in told(found)


def test_no_bit_depends_on_the_number(engine: RolloutEngine, random_checkpoint: Path) -> None:
    config = auto(random_checkpoint)
    tokenizer = AutoTokenizer.from_pretrained(random_checkpoint, subfolder="tokenizer")
    collator = Collator(config.model.family, tokenizer, config.sampling, config.collate)
    requests = collator.groups([Prompt(text="a red cat"), Prompt(text="two blue dogs")], 1, 4)

    def sampled(number: int) -> dict[str, Trajectory]:
        engine.max_num_seqs = number
        return {trajectory.request_id: trajectory for trajectory in engine.generate(requests)}

    alone, together = sampled(1), sampled(8)
    assert {size for one in alone.values() for size in one.fingerprint["batch_sizes"]} == {1}
    assert max(size for one in together.values() for size in one.fingerprint["batch_sizes"]) > 4
    for name, one in alone.items():
        other = together[name]
        assert torch.equal(one.latents, other.latents) and torch.equal(one.log_probs, other.log_probs)
        assert (one.media == other.media).all()


@pytest.mark.parametrize(
    ("speed", "most", "measured", "chosen"),
    [
        (lambda n: 10 * n, MOST, [1, 2, 4, 8, 16, 32, 64], 64),  # each costs nothing
        (lambda n: 10.0, MOST, [1, 2, 4], 1),  # nothing is gained
        (lambda n: 10 * min(n, 8), MOST, [1, 2, 4, 8, 16, 32], 8),  # the machine is full at 8
        (lambda n: {1: 10, 2: 9, 4: 20}.get(n, 5), MOST, [1, 2, 4, 8, 16], 4),  # one slow minute does not end the climb
        (lambda n: 10 * n, 4, [1, 2, 4], 4),  # no room for more
        (lambda n: 10 * n, 0, [1], 1),  # one is always tried
    ],
)
def test_the_climb_ends_where_nothing_is_gained_or_nothing_fits(speed, most, measured, chosen) -> None:
    found = climb(speed, lambda number: number <= most)
    assert (list(found), best(found)) == (measured, chosen)


def test_where_it_cannot_be_measured_it_is_refused(random_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a red cat\n")
    own = [f"prompts={tmp_path / 'prompts.txt'}", f"run_dir={tmp_path / 'run'}", "reward=jpeg_compressibility"]
    validate(auto(random_checkpoint, *own))
    validate_rollout(auto(random_checkpoint, *own), str(tmp_path / "out"))
    for elsewhere in ("backend=verl", "rollout.url=http://127.0.0.1:1"):
        with pytest.raises(UserError, match=r"rollout.max_num_seqs=auto: only an engine in this process .* give a number"):
            validate(auto(random_checkpoint, *own, elsewhere))
    for wrong in ("many", "2.5", "0", "true", "null"):
        with pytest.raises(UserError, match=rf"rollout.max_num_seqs=({wrong.title()}|{wrong}|None): expected "):
            validate(auto(random_checkpoint, *own, f"rollout.max_num_seqs={wrong}"))


def test_odd_requests_between_others_split_no_batch(engine: RolloutEngine, random_checkpoint: Path) -> None:
    """Sizes take turns in what is asked for; the engine runs each kind in full batches, then the other."""
    config = auto(random_checkpoint)
    tokenizer = AutoTokenizer.from_pretrained(random_checkpoint, subfolder="tokenizer")
    wide = replace(config.sampling, width=64)
    kinds = [Collator(config.model.family, tokenizer, sampling, config.collate) for sampling in (config.sampling, wide)]
    groups = [kind.groups([Prompt(text="a red cat")], number, 4) for number, kind in enumerate(kinds, start=1)]
    engine.max_num_seqs = 4
    mixed = [request for pair in zip(*groups, strict=True) for request in pair]
    made = list(engine.generate(mixed))
    assert len(made) == 8 and {size for one in made for size in one.fingerprint["batch_sizes"]} == {4}
