"""Images to learn from, as a data set names them: what is read, and what is refused before anything is loaded."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from omni_rollout.config import TrainConfig
from omni_rollout.data.collate import Collator
from omni_rollout.data.prompts import group_id, load_prompts
from omni_rollout.data.stream import prompt_data, to_score
from omni_rollout.data.targets import Targets
from omni_rollout.errors import UserError
from omni_rollout.launch.compose import compose
from omni_rollout.launch.validate import validate
from omni_rollout.models.qwen_image.spec import RULES
from omni_rollout.nano.pairs import write_pairs
from omni_rollout.nano.render import HELD_OUT
from omni_rollout.rewards.base.contract import preferences
from omni_rollout.types import Prompt
from tests.unit.test_capsule import trajectory

DATA = Path(__file__).parents[2] / "recipes/nano_offline/data"
PAIRS = Targets(columns=("chosen", "rejected"), multiple=RULES.multiple, max_pixels=64 * 64)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    for number, (name, size) in enumerate({"good": (32, 48), "bad": (32, 48), "wide": (48, 32), "odd": (33, 48)}.items()):
        Image.new("RGB", size, (number, 2, 3)).save(tmp_path / "images" / f"{name}.png")
    Image.new("RGB", (80, 80)).save(tmp_path / "images" / "large.png")
    whole = (tmp_path / "images" / "large.png").read_bytes()
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (48, 32, 3), dtype=np.uint8)).save(tmp_path / "images" / "noise.png")
    noise = (tmp_path / "images" / "noise.png").read_bytes()
    (tmp_path / "images" / "cut.png").write_bytes(noise[: len(noise) // 2])
    (tmp_path / "images" / "bomb.png").write_bytes(bomb(whole))
    (tmp_path / "images" / "text.png").write_text("no picture")
    frames = [Image.new("RGB", (32, 48), color) for color in ("red", "blue")]
    frames[0].save(tmp_path / "images" / "moves.webp", save_all=True, append_images=frames[1:], lossless=True)
    return tmp_path


def bomb(png: bytes) -> bytes:
    """A few bytes that say they are 60000 x 60000 pixels."""
    import zlib

    header = b"IHDR" + (60000).to_bytes(4, "big") * 2 + png[24:29]
    return png[:12] + header + zlib.crc32(header).to_bytes(4, "big") + png[33:]


def jsonl(folder: Path, *rows: dict[str, Any]) -> Path:
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "train.jsonl"


GOOD = {"prompt": "a sign", "chosen": "good.png", "rejected": "bad.png", "text": "42"}


def parquet(folder: Path) -> Path:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([GOOD]), folder / "train.parquet")
    return folder / "train.parquet"


def dataset(folder: Path) -> Path:
    with pyarrow.OSFile(str(folder / "data.arrow"), "wb") as sink:
        table = pyarrow.Table.from_pylist([GOOD])
        with pyarrow.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data.arrow"}]}))
    return folder


@pytest.mark.parametrize("write", [lambda folder: jsonl(folder, GOOD), parquet, lambda f: jsonl(f, GOOD).parent, dataset])
def test_every_form_of_a_data_set_gives_the_images_best_first(folder: Path, write: Callable[[Path], Path]) -> None:
    (prompt,) = load_prompts(write(folder), targets=PAIRS)
    assert [Path(image.path).name for image in prompt.targets] == ["good.png", "bad.png"]
    assert [(image.height, image.width) for image in prompt.targets] == [(48, 32)] * 2
    assert prompt.metadata == {"text": "42"} and not prompt.images, "their columns are nothing that a reward is told"
    assert Prompt.from_json(json.loads(json.dumps(prompt.to_json()))) == prompt
    swapped = replace(prompt, targets=prompt.targets[::-1])
    plain = replace(prompt, targets=())
    assert len({group_id(one) for one in (prompt, swapped, plain)}) == 3, "noise and seeds are those of the images, too"
    assert "targets" not in plain.to_json()


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"rejected": None}, "no `rejected` \\(algorithm.columns\\); found 'prompt', 'chosen', 'text'"),
        ({"rejected": 3}, "`rejected` is int, expected the path of an image file"),
        ({"rejected": "gone.png"}, "rejected gone.png cannot be read"),
        ({"rejected": "\0"}, "cannot be read"),
        ({"chosen": "images"}, "chosen images cannot be read"),
        ({"chosen": "text.png"}, "chosen text.png: not readable as PNG, JPEG, WEBP"),
        ({"chosen": "cut.png"}, "chosen cut.png: not readable as PNG, JPEG, WEBP"),
        ({"chosen": "bomb.png"}, "60000x60000 pixels, expected at most 4096|decompression bomb"),
        ({"chosen": "large.png"}, "80x80 pixels, expected at most 4096 \\(serve.max_pixels\\)"),
        ({"chosen": "moves.webp"}, "an animation of 2 frames, expected one picture"),
        ({"chosen": "odd.png"}, "chosen odd.png has 33x48 pixels; the model takes multiples of 16"),
        ({"chosen": "wide.png"}, "chosen 48x32, rejected 32x48 pixels; expected one size"),
    ],
)
def test_a_bad_row_is_refused_by_file_and_row(folder: Path, row: dict[str, Any], told: str) -> None:
    bad = {key: value for key, value in {**GOOD, **row}.items() if value is not None}
    with pytest.raises(UserError, match=rf"train\.jsonl, line 2: .*({told})"):
        load_prompts(jsonl(folder, GOOD, bad), targets=PAIRS)
    load_prompts(folder / "train.jsonl")  # whoever does not learn from them does not mind


def config(*more: str) -> TrainConfig:
    return compose(["experiment=nano_offline_dpo", *more])


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["algorithm.columns=[chosen]"], "diffusion_dpo learns from 2 of a row; give [chosen,rejected]"),
        (["algorithm.columns=[chosen,chosen]"], "diffusion_dpo learns from 2 of a row"),
        (["algorithm.columns=[chosen,prompt]"], "diffusion_dpo learns from 2 of a row"),
        (["algorithm.columns=[]"], "diffusion_dpo learns from 2 of a row"),
        (["rollout.group_size=8"], "rollout.group_size=8: with algorithm.columns=[chosen,rejected], a row has 2; give 2"),
        (["rollout.ahead=1"], "rollout.ahead: of no use with algorithm.columns=[chosen,rejected]"),
        (["rollout.url='http://127.0.0.1:1'"], "rollout.url: of no use with algorithm.columns"),
        (["reward.normalise=group"], "reward.normalise: of no use with algorithm.columns"),
        (
            ["backend=verl"],
            "algorithm.columns=[chosen,rejected] with backend=verl: a data set's images are learned from in one",
        ),
        (["model=nano_wan"], "algorithm.columns=[chosen,rejected]: wan2_2 makes video, and only images"),
        (["model=nano_layered"], "algorithm.columns=[chosen,rejected]: qwen_image_layered makes layers, and only images"),
        (["prompts=a.txt"], "prompts=a.txt: a .txt has no columns"),
    ],
)
def test_what_cannot_be_is_refused_by_name(more: list[str], told: str) -> None:
    with pytest.raises(UserError) as error:
        validate(config(*more))
    assert told in str(error.value)


def test_an_algorithm_that_needs_what_it_samples_has_no_such_key() -> None:
    for name in ("flow_grpo", "diffusion_nft"):
        with pytest.raises(UserError, match=f"algorithm.columns: {name} has no such key"):
            compose(["experiment=nano_ocr", f"algorithm={name}", "algorithm.columns=[image]"])
    with pytest.raises(UserError, match=r"algorithm\.best=4: of no use with algorithm\.columns"):
        validate(compose(["experiment=nano_offline_sft", "algorithm.best=4"]))


def test_a_step_asks_for_the_images_at_their_own_size_and_evaluations_sample(folder: Path) -> None:
    from transformers import AutoTokenizer

    given = config(f"prompts={jsonl(folder, GOOD)}", "evaluation.prompts=null", "evaluation.images=2")
    validate(given)
    stream, held_out = prompt_data(given)
    assert [len(prompt.targets) for prompt in stream.prompts] == [2] and [one.targets for one in held_out] == [()]
    assert to_score([*stream.prompts, *held_out]) == held_out
    assert prompt_data(config(f"prompts={folder}", "evaluation.images=0"))[1] == []
    tokenizer = AutoTokenizer.from_pretrained(given.model.path, subfolder="tokenizer")
    collator = Collator("qwen_image", tokenizer, given.sampling, given.collate)
    requests = collator.groups(stream.batch(0)[:1], 1, given.rollout.group_size)
    assert [Path(one.target.path).name for one in requests if one.target] == ["good.png", "bad.png"]
    assert {(one.spec.height, one.spec.width, one.spec.step_indices) for one in requests} == {(48, 32, ())}
    (asked, _) = collator.evaluation(held_out, given.evaluation, "before")
    assert asked.target is None and (asked.spec.height, asked.spec.width) == (64, 64)


def test_the_first_of_a_row_is_preferred() -> None:
    batch = preferences([replace(trajectory(), member=member) for member in (0, 1)])
    assert batch.total == [1.0, 0.0] and batch.breakdown == {} and batch.scored == [0, 1]


def test_the_shipped_pairs_are_what_the_code_writes(tmp_path: Path) -> None:
    write_pairs(tmp_path)
    files = {path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()}
    assert files == {path.relative_to(DATA) for path in DATA.rglob("*") if path.is_file()}
    for file in files:
        if file.suffix == ".png":  # compressed otherwise by another zlib
            assert np.array_equal(np.asarray(Image.open(tmp_path / file)), np.asarray(Image.open(DATA / file))), file
        else:
            assert (tmp_path / file).read_bytes() == (DATA / file).read_bytes()
    rows = [json.loads(line) for line in (DATA / "train.jsonl").read_text().splitlines()]
    assert not {row["text"] for row in rows} & {*HELD_OUT}
    for row in rows:
        assert row["chosen"].startswith(f"{row['text']}_{row['color']}") and row["rejected"].endswith(f"_{row['color']}.png")
        assert row["rejected"] != row["chosen"]
