"""Prompt files: what is read, what is refused and how it is told; and that batches depend on step and seed alone."""

from __future__ import annotations

import hashlib
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
from PIL import Image

from omni_rollout.config import TrainConfig
from omni_rollout.data.prompts import group_id, load_prompts, prompts_digest
from omni_rollout.data.stream import PromptStream, prompt_data
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


def rows(folder: Path, name: str, *texts: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("".join(json.dumps({"prompt": text, "kind": text[0]}) + "\n" for text in texts))


def configured(**keys: object) -> TrainConfig:
    config = TrainConfig(prompts=keys.pop("prompts"))
    config.rollout.prompts_per_step = 2
    config.evaluation.prompts = keys.get("evaluation")  # type: ignore[assignment]
    return config


@pytest.mark.parametrize("name", ["train.jsonl", "train_metadata.jsonl"])
def test_a_folder_with_train_test_and_images(tmp_path: Path, name: str) -> None:
    (tmp_path / "images").mkdir()
    Image.new("RGB", (8, 4), "red").save(tmp_path / "images" / "a.png")
    (tmp_path / name).write_text('{"prompt": "make it blue", "images": "a.png", "any": {"column": [1]}}\n')
    stream, shown = prompt_data(configured(prompts=str(tmp_path)))
    (prompt,) = stream.prompts
    assert prompt.metadata == {"any": {"column": [1]}} and prompt.images[0].path == str(tmp_path / "images" / "a.png")
    assert shown == [prompt]
    (tmp_path / "test.txt").write_text("a held-out one\n")
    assert prompt_data(configured(prompts=str(tmp_path)))[1] == [Prompt(text="a held-out one")]
    rows(tmp_path, "other.jsonl", "x")
    assert [p.text for p in prompt_data(configured(prompts=str(tmp_path), evaluation=str(tmp_path / "other.jsonl")))[1]] == [
        "x"
    ]
    with pytest.raises(UserError, match=r"no prompts in this folder; expected train\.jsonl"):
        load_prompts(tmp_path / "images")


def test_a_dataset_that_hugging_face_saved(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_dict({"prompt": ["a", "b", "c"], "n": [1, None, 3]}).select([2, 0, 1])
    table.save_to_disk(tmp_path / "one", num_shards=2)
    expected = [Prompt(text="c", metadata={"n": 3}), Prompt(text="a", metadata={"n": 1}), Prompt(text="b")]
    assert load_prompts(tmp_path / "one") == expected
    datasets.DatasetDict({"train": table, "test": table.select([1])}).save_to_disk(tmp_path / "split")
    stream, shown = prompt_data(configured(prompts=str(tmp_path / "split")))
    assert list(stream.prompts) == expected and shown == expected[1:2]
    (tmp_path / "one" / "state.json").write_text("{")
    with pytest.raises(UserError, match="not a dataset that pyarrow can read"):
        load_prompts(tmp_path / "one")


FUNCTIONS = """
def rows():
    yield 'a cat'
    yield {'prompt': 'a dog', 'text': '42'}

def wrong():
    return [4]
"""


def test_a_function_gives_prompts(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "def rows():\n    yield 'a cat'\n    yield {'prompt': 'a dog', 'text': '42'}\n\ndef wrong():\n    return [4]\n"
    )
    assert load_prompts(f"{file}:rows") == [Prompt(text="a cat"), Prompt(text="a dog", metadata={"text": "42"})]
    with pytest.raises(UserError, match=r"mine\.py:wrong, row 1: found int"):
        load_prompts(f"{file}:wrong")
    file.write_text("def broken():\n    raise OSError('no network')\n")
    other = tmp_path / "other.py"
    other.write_text(file.read_text())
    with pytest.raises(UserError, match=r"other\.py:broken: raised OSError: no network"):
        load_prompts(f"{other}:broken")


def test_the_digest_of_prompts_is_the_files_own_or_the_prompts(tmp_path: Path) -> None:
    rows(tmp_path, "train.jsonl", "a", "b")
    assert prompts_digest(str(tmp_path / "train.jsonl")) == hashlib.sha256((tmp_path / "train.jsonl").read_bytes()).hexdigest()
    before, mixed = prompts_digest(str(tmp_path)), {str(tmp_path): 1.0, str(tmp_path / "train.jsonl"): 2.0}
    assert prompts_digest(mixed) != prompts_digest({**mixed, str(tmp_path): 2.0}), "the weights decide a step's prompts, too"
    rows(tmp_path, "train.jsonl", "a", "c")
    assert prompts_digest(str(tmp_path)) != before


@given(sizes=st.lists(st.integers(1, 9), min_size=2, max_size=3), seed=st.integers(0, 5), data=st.data())
@settings(deadline=None, max_examples=40)
def test_a_mixture_by_weight(sizes: list[int], seed: int, data: st.DataObject) -> None:
    weights = [data.draw(st.sampled_from([0.25, 1.0, 3.0])) for _ in sizes]
    names = [f"{part}-{number}" for part, size in enumerate(sizes) for number in range(size)]
    mixture = list(zip(sizes, weights, strict=True))
    one, again = (PromptStream([Prompt(text=name) for name in names], 1, seed, mixture) for _ in range(2))
    steps = 40 * len(names)
    drawn = [one.batch(step)[0].text for step in range(steps)]
    for part, (size, weight) in enumerate(mixture):
        own = Counter(name for name in drawn if name.startswith(f"{part}-"))
        assert abs(sum(own.values()) / 40 - len(names) * weight / sum(weights)) < 1, "an epoch has what the weight says"
        counts = [own[f"{part}-{number}"] for number in range(size)]
        assert max(counts) - min(counts) <= 1, "all of a part in turn"
    for step in data.draw(st.lists(st.integers(0, steps - 1), max_size=3)):
        assert again.batch(step)[0].text == drawn[step], "a function of the step and the seed"


def test_a_mixture_is_configured(tmp_path: Path) -> None:
    rows(tmp_path, "a.jsonl", "a0", "a1", "a2")
    rows(tmp_path, "b.jsonl", "b0")
    given = {str(tmp_path / "a.jsonl"): 1, str(tmp_path / "b.jsonl"): 1}
    stream, shown = prompt_data(configured(prompts=given))
    drawn = Counter(prompt.text[0] for step in range(20) for prompt in stream.batch(step))
    assert drawn == {"a": 20, "b": 20} and len(shown) == 4
