"""Prompts that are too wide are told all at once, and before anything is loaded or written."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from omni_rollout.cli import main
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


def test_a_run_with_a_wide_prompt_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "p.txt").write_text("\n".join(['a red sign that says "1"', *WIDE]))
    assert main(["train", "experiment=nano_ocr", f"prompts={tmp_path}/p.txt", f"run_dir={tmp_path}/run"]) == 2
    assert "number 2: prompt 'a green card" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def changed(tmp_path: Path, **parts: Any) -> str:
    """A folder like the nano checkpoint, whose tokenizer.json has other parts."""
    shutil.copytree(CHECKPOINTS[0], tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    path = tmp_path / "model" / "tokenizer" / "tokenizer.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **parts}))
    return str(tmp_path / "model")


@pytest.mark.parametrize("length", [4, 2000])
def test_what_the_file_keeps_of_cutting_and_filling_is_not_obeyed(tmp_path: Path, length: int) -> None:
    """The nano tokenizer's own file cuts at 1058 tokens; transformers' class does not."""
    padding = {"strategy": {"Fixed": 512}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0}
    path = changed(tmp_path, padding={**padding, "pad_token": "<|endoftext|>"})
    text = "cat " * length
    stock = AutoTokenizer.from_pretrained(path, subfolder="tokenizer")
    assert list(QuickTokenizer(path)(text)["input_ids"]) == list(stock(text)["input_ids"])
    assert len(QuickTokenizer(CHECKPOINTS[0])("cat " * 2000)["input_ids"]) > 1058


def test_what_is_too_wide_by_the_file_alone_is_left_to_transformers(tmp_path: Path) -> None:
    """Its class sets the normalizer anew, so a text has fewer tokens than the file says."""
    path = changed(tmp_path, normalizer={"type": "Replace", "pattern": {"String": "red"}, "content": "r e d r e d r e d r e d"})
    (tmp_path / "p.txt").write_text('a red sign that says "1"\n')
    config = compose(["experiment=nano_ocr", f"model.path={path}", f"prompts={tmp_path}/p.txt", f"run_dir={tmp_path}/run"])
    config.evaluation.prompts = config.prompts
    quick = collator_of(config, quick_tokenizer(path))
    with pytest.raises(UserError):
        check_widths(quick, prompts(['a red sign that says "1"']), [])
    assert check_before(config).fit


def test_a_file_of_another_version_is_left_to_transformers(tmp_path: Path) -> None:
    assert quick_tokenizer(changed(tmp_path, model={"type": "Future"})) is None


def test_a_dry_run_of_the_recipe_needs_no_torch(tmp_path: Path) -> None:
    words = ["train", "experiment=nano_ocr", "dry_run=true", f"run_dir={tmp_path}/run"]
    code = f"import sys; from omni_rollout.cli import main; print(main({words!r}), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("0 False\n")


def test_prompts_with_images_wait_for_their_processor(tmp_path: Path) -> None:
    config = compose(["experiment=nano_edit", f"run_dir={tmp_path}/run"])
    assert not check_before(config).fit
    assert check_before(compose(["experiment=nano_ocr", f"run_dir={tmp_path}/run"])).fit
