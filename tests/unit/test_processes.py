"""How a run may be spread over processes, and how many engines that makes."""

from __future__ import annotations

import pytest

from omni_rollout.config import AUTO, Backend, TrainConfig
from omni_rollout.launch.compose import compose
from omni_rollout.launch.processes import max_num_seqs_problems, process_problems

VERL, COLOCATED = "backend=verl", "rollout.placement=colocated"


def config(*overrides: str) -> TrainConfig:
    return compose(["model=nano", "prompts=prompts.txt", *overrides])


@pytest.mark.parametrize(
    ("overrides", "engines"),
    [
        ((), 1),
        ((VERL, "trainer.ranks=4"), 1),
        ((VERL, "trainer.ranks=4", "rollout.workers=3"), 3),
        ((VERL, "trainer.ranks=4", COLOCATED), 4),
        ((VERL, "trainer.ranks=4", COLOCATED, "rollout.workers=4"), 4),
        ((VERL, COLOCATED), 1),
    ],
)
def test_engines_of_a_run_that_can_be(overrides: tuple[str, ...], engines: int) -> None:
    assert (config(*overrides).engines, list(process_problems(config(*overrides)))) == (engines, [])


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (("rollout.workers=2",), "rollout.workers=2: backend=embedded is one process; give backend=verl"),
        (("trainer.ranks=2",), "trainer.ranks=2: backend=embedded is one process; give backend=verl"),
        (
            (COLOCATED,),
            "rollout.placement=colocated: backend=embedded is one process, so it is colocated already; leave it out",
        ),
        (
            (VERL, "trainer.ranks=2", "rollout.workers=1", COLOCATED),
            "rollout.workers=1 with rollout.placement=colocated: each of trainer.ranks=2 processes holds one engine; "
            "leave rollout.workers out",
        ),
        (
            (VERL, "rollout.workers=2", COLOCATED),
            "rollout.workers=2 with rollout.placement=colocated: each of trainer.ranks=1 processes holds one engine; "
            "leave rollout.workers out",
        ),
        (
            (VERL, "rollout.url=http://a:1"),
            "rollout.url=http://a:1: backend=verl has engines of its own; give backend=embedded",
        ),
    ],
)
def test_what_cannot_be_is_refused_by_name(overrides: tuple[str, ...], problem: str) -> None:
    assert list(process_problems(config(*overrides))) == [problem]


def test_only_an_engine_in_this_process_is_measured() -> None:
    asked = config(f"rollout.max_num_seqs={AUTO}")
    assert not list(max_num_seqs_problems(asked))
    asked.backend = Backend.verl
    (problem,) = max_num_seqs_problems(asked)
    assert problem.startswith("rollout.max_num_seqs=auto: only an engine in this process can be measured")
