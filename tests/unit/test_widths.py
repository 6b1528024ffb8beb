"""Prompts that are too wide are told all at once, and before torch is imported."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from omni_rollout.config import TrainConfig
from omni_rollout.data.prompts import load_prompts
from omni_rollout.errors import UserError
from omni_rollout.launch.compose import compose
from omni_rollout.launch.paths import recipe_dir
from omni_rollout.run.before import check_before
from omni_rollout.run.widths import QuickTokenizer, check_widths, collator_of, quick_tokenizer
from omni_rollout.types import Prompt

CHECKPOINTS = [str(recipe_dir(name) / "checkpoint") for name in ("nano", "nano_edit", "nano_layered", "nano_wan")]
WIDE = ['a green card with the number "13" and "13"', 'a white sign that says "4" "4"', 'a red sign that says "1" "12345"']


@pytest.fixture
def config() -> TrainConfig:
    return compose(["model=nano", "prompts=p.txt"])


def prompts(texts: Sequence[str]) -> list[Prompt]:
    return [Prompt(text=text) for text in texts]


@pytest.mark.parametrize("path", CHECKPOINTS, ids=lambda path: Path(path).parent.name)
def test_the_quick_tokenizer_cuts_as_transformers_does(path: str) -> None:
    stock = AutoTokenizer.from_pretrained(path, subfolder="tokenizer")
    quick = QuickTokenizer(path)

    @given(st.text(max_size=60) | st.text('a red sign "09"<|im_start|>\n', max_size=80))
    @settings(deadline=None, max_examples=200)
    def agree(text: str) -> None:
        assert list(quick(text)["input_ids"]) == list(stock(text)["input_ids"])

    agree()
    for prompt in load_prompts(str(recipe_dir("nano") / "data" / "train.jsonl")):
        assert list(quick(prompt.text)["input_ids"]) == list(stock(prompt.text)["input_ids"])


def test_a_tokenizer_in_other_files_is_left_to_transformers(tmp_path: Path) -> None:
    assert quick_tokenizer("Qwen/Qwen-Image") is None
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "vocab.json").write_text("{}")
    assert quick_tokenizer(str(tmp_path)) is None


def test_all_that_are_too_wide_are_told_the_widest_first(config: TrainConfig) -> None:
    collator = collator_of(config, quick_tokenizer(config.model.path))
    fitting = ['a red sign that says "1"']
    check_widths(collator, prompts(fitting), [])
    with pytest.raises(UserError) as told:
        check_widths(collator, prompts([*fitting, *WIDE]), prompts([*fitting, WIDE[0]]))
    lines = str(told.value).splitlines()
    assert [line.partition(": ")[0] for line in lines] == ["number 2", "evaluation, number 2", "number 4", "number 3"]
    widest = int(lines[0].rpartition("=")[2])
    config.collate.prompt_width = widest
    check_widths(collator_of(config, quick_tokenizer(config.model.path)), prompts(WIDE), prompts(WIDE))


def test_many_are_counted(config: TrainConfig) -> None:
    with pytest.raises(UserError, match=r"\nand 7 more of 12 prompts$"):
        check_widths(collator_of(config, quick_tokenizer(config.model.path)), prompts(WIDE * 4), prompts(WIDE * 4))


def test_a_run_with_a_wide_prompt_ends_before_torch(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("\n".join(['a red sign that says "1"', *WIDE]))
    words = ["train", "experiment=nano_ocr", f"prompts={tmp_path}/p.txt", f"run_dir={tmp_path}/run"]
    code = f"import sys; from omni_rollout.cli import main; print(main({words!r}), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("2 False\n") and "number 2: prompt 'a green card" in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_dry_run_of_the_recipe_needs_no_torch(tmp_path: Path) -> None:
    words = ["train", "experiment=nano_ocr", "dry_run=true", f"run_dir={tmp_path}/run"]
    code = f"import sys; from omni_rollout.cli import main; print(main({words!r}), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("0 False\n")


def test_prompts_with_images_wait_for_their_processor(tmp_path: Path) -> None:
    config = compose(["experiment=nano_edit", f"run_dir={tmp_path}/run"])
    assert not check_before(config).fit
    assert check_before(compose(["experiment=nano_ocr", f"run_dir={tmp_path}/run"])).fit
