"""`trainer.fit=auto`: what the plan says fits, the cheapest first, what was given left alone, and a refusal with its reason."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from omni_rollout.cli import main
from omni_rollout.errors import UserError
from omni_rollout.launch.compose import compose
from omni_rollout.launch.validate import validate_plan
from omni_rollout.models.qwen_image.sizes import read_sizes
from omni_rollout.plan import fit
from omni_rollout.plan.closest import CHANGES, changed
from omni_rollout.plan.split import Gpus, make_plan, make_run

QWEN = ["experiment=qwen_image_ocr_lora", "prompts=unread.txt"]
PUBLISHED = read_sizes("Qwen/Qwen-Image")


@pytest.mark.parametrize(
    ("gpus", "given", "added"),
    [
        ("1x80", [], []),
        ("1x69", [], ["trainer.offload=optimizer"]),
        ("1x141", ["trainer.lora_rank=0"], None),
        ("1x48", [], None),
        ("8x80", ["trainer.lora_rank=0"], ["trainer.engine=fsdp2", "trainer.reduce=backward", "backend=verl"]),
        ("8x80", ["backend=embedded"], []),
        ("8x80", ["profile=true"], []),
        ("2x80", ["trainer.lora_rank=0"], ["trainer.offload=all", "trainer.engine=fsdp2", "trainer.reduce=backward"]),
    ],
)
def test_what_is_set(gpus: str, given: list[str], added: list[str] | None) -> None:
    words = [*QWEN, *given]
    if added is None:
        largest = r"of which .*(text encoder 14\.2|master weights 76\.1) GiB"
        with pytest.raises(UserError, match=rf"makes the run fit .*; the least is .* GiB in its \w+, with .*{largest}"):
            fit.fitted(words, gpus)
        return
    overrides, told = fit.fitted(words, gpus)
    new = overrides[len(words) :]
    assert overrides[: len(words)] == words and new[: len(added)] == added
    assert told.startswith(
        f"fit         {Gpus.parse(gpus) if not {'backend=embedded', 'profile=true'} & {*given} else '1 GPU of 80 GiB'}: "
    )
    assert "nothing was changed" in told if not new else all(word in told for word in new)


@settings(deadline=None, max_examples=8)
@given(
    st.integers(40, 150),
    st.sampled_from([1, 8]),
    st.sampled_from([[], ["trainer.lora_rank=0"], ["sampling.height=1024", "sampling.width=1024"]]),
    st.sets(
        st.sampled_from(
            [
                "trainer.micro_batch_size=3",
                "trainer.gradient_checkpointing=false",
                "rollout.max_num_seqs=2",
                "trainer.engine=torch",
            ]
        )
    ),
)
def test_what_it_makes_fits_is_valid_and_leaves_alone_what_was_given(
    gib: int, count: int, kind: list[str], given: set[str]
) -> None:
    words = [*QWEN, *kind, *sorted(given)]
    try:
        overrides, _ = fit.fitted(words, f"{count}x{gib}")
    except UserError as error:
        assert "nothing that is known here makes the run fit" in str(error)
        return
    config, gpus = compose(overrides), Gpus.parse(f"{count}x{gib}")
    validate_plan(config)
    plan = make_plan(make_run(config, PUBLISHED), gpus, config.trainer.ranks if count > 1 else None)
    assert plan.fits
    keys = [word.partition("=")[0] for word in overrides]
    assert len(set(keys)) == len(keys), "nothing is given twice"


def test_a_later_change_is_made_only_where_those_before_it_are_not_enough() -> None:
    """At every size at which something new is needed, none of the cheaper choices fits."""
    before: list[str] | None = None
    words = [*QWEN, "trainer.micro_batch_size=1"]
    for gib in range(72, 56, -1):
        try:
            overrides, _ = fit.fitted(words, f"1x{gib}")
        except UserError:
            break
        new = overrides[len(words) :]
        if before is not None and new != before:
            config = compose([*words, *before])
            assert make_plan(make_run(config, PUBLISHED), Gpus.parse(f"1x{gib}")).together_bytes > gib << 30
        before = new
    assert before, "offloading makes it fit where it did not"


def test_numbers_only_go_down() -> None:
    config = replace(compose(QWEN))
    assert not fit._lowers(changed(config, "trainer.micro_batch_size=2"), "trainer.micro_batch_size=4")
    assert fit._lowers(changed(config, "trainer.micro_batch_size=8"), "trainer.micro_batch_size=4")


def test_a_change_is_what_the_command_line_makes_of_it() -> None:
    words = [*QWEN, "trainer.ema_decay=0.5", "algorithm.kl_coef=0.5", "run_dir=one"]
    before = compose(words)
    for text in {*CHANGES, *fit.CHANGES}:
        assert changed(before, text) == compose([*words, *text.split()]), text


@pytest.mark.parametrize(
    ("lines", "visible", "expected"),
    [
        ("81559\n81559\n", None, Gpus(nodes=2, per_node=2, gib=79)),
        ("81559\n40960\n", "1,0", Gpus(nodes=2, per_node=2, gib=40)),
        ("81559\n81559\n", "0", Gpus(nodes=2, per_node=1, gib=79)),
        ("81559\n", "", None),
        ("81559\n81559\n", "-1", None),
        ("81559\n81559\n", "1,-1,0", Gpus(nodes=2, per_node=1, gib=79)),
        ("", None, None),
    ],
)
def test_the_machine_at_hand(
    lines: str, visible: str | None, expected: Gpus | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A program of this name that says what nvidia-smi would; without a GPU: the memory, or the container's share of it."""
    tool, limit = tmp_path / "nvidia-smi", tmp_path / "memory.max"
    tool.write_text(f"#!/bin/sh\nprintf '{lines}'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    limit.write_text(f"{3 << 30}\n")
    monkeypatch.setattr(fit, "CGROUP_LIMIT", limit)
    assert fit.machine(2) == (expected or Gpus(nodes=1, per_node=1, gib=3, cpu=True))
    limit.write_text("max\n")
    assert fit.machine().cpu == (expected is None)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["rollout.url=http://127.0.0.1:1"], "rollout.url=http://127.0.0.1:1: the engine is elsewhere"),
        (["backend=verl"], "only one process is planned on a CPU"),
    ],
)
def test_what_there_is_no_arithmetic_for_is_told(words: list[str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit, "_gpus_mib", list)
    with pytest.raises(UserError, match=message):
        fit.fitted([*QWEN, *words])


@pytest.mark.parametrize(
    ("words", "gpus", "message"),
    [
        (["trainer.engine=fsdp2"], "1x80", "trainer.engine=fsdp2: one rank has nothing to cut"),
        (["trainer.reduce=backward"], "1x80", "trainer.reduce=backward"),
        (
            ["backend=verl"],
            "1x80",
            "trainer.fit=auto with backend=verl on one GPU: an engine and a trainer rank apart need two",
        ),
        (["rollout.ahead=1", "trainer.ranks=8"], "8x80", "nothing that is known here makes the run fit 8 GPUs of 80 GiB"),
    ],
)
def test_what_cannot_be_had_is_refused_by_name(words: list[str], gpus: str, message: str) -> None:
    with pytest.raises(UserError) as refused:
        fit.fitted([*QWEN, *words], gpus)
    assert message in str(refused.value)


def test_plan_does_not_take_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "experiment=nano_ocr", "trainer.fit=auto", "gpus=1x80"]) != 0
    assert "trainer.fit=auto: of train, not of plan" in capsys.readouterr().err


def test_another_value_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "experiment=nano_ocr", "trainer.fit=yes", "dry_run=true"]) == 2
    assert "trainer.fit=" in capsys.readouterr().err


def test_the_command_says_it_and_refuses_with_the_reason(capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setattr(fit, "_gpus_mib", list)
    assert main(["train", "experiment=nano_ocr", "trainer.fit=auto", "dry_run=true"]) == 0
    assert "fit         a CPU with " in capsys.readouterr().out
    monkeypatch.setattr(fit, "machine", lambda nodes: Gpus(nodes=1, per_node=1, gib=1, cpu=True))
    assert main(["train", "experiment=nano_ocr", "trainer.fit=auto", "dry_run=true"]) == 2
    assert "trainer.fit=auto: nothing that is known here makes the run fit a CPU with 1 GiB" in capsys.readouterr().err


def test_the_runs_configuration_holds_the_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from omni_rollout.launch.compose import to_yaml

    overrides, _ = fit.fitted(QWEN, "1x69")
    kept = yaml.safe_load(to_yaml(compose(overrides)))
    assert kept["trainer"]["offload"] == "optimizer"
