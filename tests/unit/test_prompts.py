"""Prompt files: what is read, what is refused and how it is told; and that batches depend on step and seed alone."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from omni_rollout.data.prompts import PromptStream, group_id, load_prompts
from omni_rollout.errors import UserError
from omni_rollout.types import Prompt

CATS = Prompt(text="two cats", metadata={"text": "42", "tags": ["a", "b"]})


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_text_file_gives_one_prompt_a_line(tmp_path: Path) -> None:
    path = write(tmp_path, "p.txt", "\ufefffirst\r\n\n  \n  second, ünïcode \u2028 line\nlast")
    assert [prompt.text for prompt in load_prompts(path)] == ["first", "second, ünïcode \u2028 line", "last"]


def test_jsonl_keeps_every_other_key_and_merges_metadata(tmp_path: Path) -> None:
    rows = [{"prompt": "two cats", "text": "42", "metadata": {"tags": ["a", "b"]}}, {"prompt": " a dog ", "metadata": None}]
    path = write(tmp_path, "p.jsonl", "\n".join(map(json.dumps, rows)) + "\n\n")
    assert load_prompts(path) == [CATS, Prompt(text=" a dog ")]


def test_parquet_equals_jsonl(tmp_path: Path) -> None:
    rows = [{"prompt": "two cats", "text": "42", "metadata": {"tags": ["a", "b"]}}, {"prompt": "a dog"}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "p.parquet")
    assert load_prompts(str(tmp_path / "p.parquet")) == [CATS, Prompt(text="a dog")]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.csv", "a", r"p\.csv: suffix '\.csv' is unknown; expected one of \.txt, \.jsonl, \.parquet"),
        ("p.txt", "\n \n", r"p\.txt: holds no prompts"),
        ("p.txt", b"good\nb\xffd", r"p\.txt, line 2: byte 0xff is not UTF-8"),
        ("p.jsonl", "", r"p\.jsonl: holds no prompts"),
        ("p.jsonl", '{"prompt": "a"}\n\n{"prompt": ', r"p\.jsonl, line 3: not JSON .* found '{\"prompt\":'"),
        ("p.jsonl", '{"prompt": "a", "x": NaN}', r"p\.jsonl, line 1: not JSON \(NaN is not"),
        ("p.jsonl", '{"prompt": "a", "x": [-1e999]}', r"p\.jsonl, line 1: not JSON \(-1e999 is not a finite number"),
        ("p.jsonl", '{"prompt": "a", "x": ' + "1" * 5000 + "}", r"p\.jsonl, line 1: not JSON"),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": "a", "x": ' + "[" * 100_000, r"line 2: not JSON \(nested too deep\)"),
        ("p.jsonl", '{"prompt": "a", "x": ' + "[" * 40 + "]" * 40 + "}", r"line 1: metadata nested deeper than 32 levels"),
        ("p.jsonl", '{"prompt": "a", "x": ' + '{"y":' * 40 + "1" + "}" * 41, r"line 1: metadata nested deeper than 32 levels"),
        ("p.jsonl", '{"prompt": "a"}\r{"prompt": "b"}', r"p\.jsonl, line 1: a carriage return inside a line"),
        ("p.txt", "first\rsecond\r", r"p\.txt, line 1: a carriage return inside a line; save the file with \\n"),
        ("p.txt", "good\na\0b", r"p\.txt, line 2: the prompt holds '\\x00' at character 2"),
        ("p.jsonl", '{"prompt": "a\\ud800"}', r"p\.jsonl, line 1: the prompt holds '\\ud800' at character 2"),
        ("p.jsonl", '{"prompt": "\\u001b[2J"}', r"p\.jsonl, line 1: the prompt holds '\\x1b' at character 1"),
        ("p.jsonl", "[1]", r"p\.jsonl, line 1: found list, expected an object"),
        ("p.jsonl", '{"promt": "a", "text": "b"}', r"p\.jsonl, line 1: no `prompt`; found 'promt', 'text'"),
        ("p.jsonl", '{"prompt": 7}', r"p\.jsonl, line 1: `prompt` is int 7, expected a string"),
        ("p.jsonl", '{"prompt": "  "}', r"p\.jsonl, line 1: `prompt` is empty"),
        ("p.jsonl", '{"prompt": "a", "metadata": [1]}', r"p\.jsonl, line 1: `metadata` is list, expected an object"),
        ("p.jsonl", '{"prompt": "a", "x": 1, "metadata": {"x": 2}}', r"line 1: x is given both"),
        ("p.parquet", "no parquet", r"p\.parquet: not a parquet file"),
    ],
)
def test_bad_files_are_refused_by_line(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_prompts(write(tmp_path, name, content))


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"p\.txt: no such file"):
        load_prompts(tmp_path / "p.txt")


def test_windows_line_ends_tabs_and_line_breaks_inside_a_json_prompt_are_kept(tmp_path: Path) -> None:
    assert [prompt.text for prompt in load_prompts(write(tmp_path, "p.txt", "a\tb\r\nc\r\n"))] == ["a\tb", "c"]
    assert load_prompts(write(tmp_path, "p.jsonl", '{"prompt": "a\\nb"}\r\n')) == [Prompt(text="a\nb")]


PIECES = st.sampled_from(
    [b"{", b"}", b"[", b'"prompt"', b":", b'"a"', b",", b"\n", b"\r", b"1e999", b"\\ud800", b"\xff", b"\0"]
)


@given(suffix=st.sampled_from([".txt", ".jsonl", ".parquet"]), content=st.binary() | st.lists(PIECES).map(b"".join))
@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_give_prompts_or_a_user_error(tmp_path: Path, suffix: str, content: bytes) -> None:
    path = write(tmp_path, f"p{suffix}", content)
    try:
        prompts = load_prompts(path)
    except UserError as error:
        assert str(error).startswith(str(path)) and len(str(error)) < 1000
    else:
        assert prompts and all(group_id(prompt) and prompt.text.strip() for prompt in prompts)


@given(data=st.data())
@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_damaged_parquet_file_gives_prompts_or_a_user_error(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "p.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"prompt": "a dog", "x": 1.5}]), path)
    content = bytearray(path.read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.just(len(content)) | st.integers(0, len(content)))])
    try:
        load_prompts(path)
    except UserError as error:
        assert str(error).startswith(str(path))


def test_a_parquet_map_is_what_json_would_give(tmp_path: Path) -> None:
    table = pyarrow.table({"prompt": ["a"], "x": pyarrow.array([[("k", 1)]], pyarrow.map_(pyarrow.string(), pyarrow.int64()))})
    pyarrow.parquet.write_table(table, tmp_path / "p.parquet")
    assert load_prompts(tmp_path / "p.parquet") == [Prompt(text="a", metadata={"x": [["k", 1]]})]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "a"}, {"prompt": None}], r"row 2: no `prompt`"),
        ([{"prompt": 1}], r"row 1: `prompt` is int 1"),
        ([{"prompt": "a", "x": b"\xff"}], r"row 1: column 'x' cannot be written as JSON"),
        ([{"prompt": "a", "x": float("nan")}], r"row 1: column 'x' cannot be written as JSON"),
    ],
)
def test_bad_parquet_rows_are_refused(tmp_path: Path, rows: list[dict[str, object]], message: str) -> None:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "p.parquet")
    with pytest.raises(UserError, match=message):
        load_prompts(tmp_path / "p.parquet")


def test_group_id_is_the_same_in_every_process() -> None:
    code = (
        "from omni_rollout.data.prompts import group_id; from omni_rollout.types import Prompt;"
        "print(group_id(Prompt(text='two cats', metadata={'tags': ['a', 'b'], 'text': '42'})))"
    )
    for hash_seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": hash_seed}, capture_output=True, text=True, check=True
        )
        assert done.stdout.strip() == group_id(CATS)
    assert group_id(CATS) == "75b33ec7bca13aa5"


def test_group_id_tells_prompts_apart_by_text_and_metadata() -> None:
    prompts = [CATS, Prompt(text="two cats"), Prompt(text="two cats", metadata={"text": "43"}), Prompt(text="two cat")]
    assert len({group_id(prompt) for prompt in prompts}) == len(prompts)


@given(count=st.integers(1, 40), size=st.integers(1, 12), seed=st.integers(-5, 2**40), step=st.integers(0, 10**6))
@settings(deadline=None, max_examples=100)
def test_a_batch_depends_on_step_and_seed_alone(count: int, size: int, seed: int, step: int) -> None:
    prompts = [Prompt(text=str(index)) for index in range(count)]
    stream = PromptStream(prompts, size, seed)
    for earlier in range(3):
        stream.batch(earlier)
    batch = stream.batch(step)
    assert batch == PromptStream(prompts, size, seed).batch(step)
    assert len(batch) == size
    uses = Counter(prompt.text for prompt in batch)
    assert max(uses.values()) - min((uses[prompt.text] for prompt in prompts), default=0) <= 1  # as even as it can be


@pytest.mark.parametrize(("count", "size"), [(12, 4), (13, 4), (9, 9), (9, 5)])
def test_an_epoch_shows_no_prompt_twice_and_the_next_has_another_order(count: int, size: int) -> None:
    stream = PromptStream([Prompt(text=str(index)) for index in range(count)], size, seed=0)
    steps = count // size
    epochs = [[p.text for step in range(steps) for p in stream.batch(e * steps + step)] for e in range(20)]
    assert all(len(set(epoch)) == steps * size for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 20
    assert {text for epoch in epochs for text in epoch} == {str(index) for index in range(count)}
    assert stream.batch(0) != PromptStream(stream.prompts, size, seed=1).batch(0)


@pytest.mark.parametrize(
    ("prompts", "size", "step", "message"),
    [([], 4, 0, "no prompts"), ([CATS], 0, 0, "prompts_per_step=0"), ([CATS], 1, -1, "step=-1")],
)
def test_impossible_streams_are_refused(prompts: list[Prompt], size: int, step: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        PromptStream(prompts, size, seed=0).batch(step)
