"""`omni-rollout report` on run folders made here: each part says what the files say, and nothing in them can break the page."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import statistics
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from omni_rollout.cli import main
from omni_rollout.errors import UserError
from omni_rollout.launch.compose import compose, to_yaml
from omni_rollout.monitor.report import page, pictures
from omni_rollout.monitor.report.provenance import command_of
from omni_rollout.monitor.report.read import read_run
from omni_rollout.monitor.verdict import paired
from omni_rollout.run.folder import note_command
from omni_rollout.trajectories.sheet import cut, image_grid

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)> \"'&"
COUNT, STEPS = 7, 4
REWARDS = {0: [0.5] * COUNT, 2: [0.6] * COUNT, 4: [1.0, 0.75, 0.5, 0.5, 0.5, 0.25, 0.0]}
SHARP = {0: [10.0] * COUNT, 2: [10.0] * COUNT, 4: [10.0, 2.0, 1.0, 10.0, 10.0, 10.0, 10.0]}


class Page(HTMLParser):
    """Text and tags of a page; every tag that must be closed is."""

    VOID = ("meta", "img")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data + "\n"


def colour(step: int, index: int) -> np.ndarray:
    return np.full((8, 8, 3), (40 * step, 30 * index, 255 - 30 * index), np.uint8)


def line(step: int, **more: Any) -> dict[str, Any]:
    gaps = {f"rollout_corr/logprob_abs_diff/ts_{t}": 0.0 for t in range(3)}
    return {
        "step": step,
        "parity/ppo_kl_mb0": 0.0,
        "parity/bitwise_equal_fraction": 1.0,
        "parity/weights_equal": 1.0,
        **gaps,
        "actor/pg_clipfrac": 0.1 * step,
        "actor/grad_norm": 0.5,
        "actor/drift": 0.001 * step,
        "actor/lr": 1e-4,
        "critic/rewards/mean": 0.1 * step,
        "timing_s/rollout": 3.0,
        "timing_s/update": 1.0,
        "timing_s/step": 5.0,
        "weights/digest": f"{step:064x}",
        **more,
    }


def evaluated(step: int) -> dict[str, float]:
    return {"evaluation/reward": statistics.fmean(REWARDS[step]), "evaluation/reward_se": 0.05, "guard/sharpness": 8.0 - step}


def write(folder: Path, lines: list[dict[str, Any]]) -> None:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Four steps, evaluated before, after step 2 and after step 4."""
    folder = tmp_path / "mine"
    (folder / "images").mkdir(parents=True)
    config = compose(["experiment=nano_ocr", "trainer.steps=4", "trainer.learning_rate=3e-4", f"run_dir={folder}"])
    (folder / "config.yaml").write_text(to_yaml(config))
    steps = [line(step, **(evaluated(step) if step % 2 == 0 else {})) for step in range(1, STEPS + 1)]
    write(folder, [{"step": 0, **evaluated(0)}, *steps])
    rows = []
    for step, rewards in REWARDS.items():
        image_grid([("x", colour(step, index)) for index in range(COUNT)]).save(folder / f"images/evaluation_{step:04d}.png")
        for index, reward in enumerate(rewards):
            guards = {"sharpness": SHARP[step][index], "dark_share": 0.0}
            prompt = HOSTILE if index == 1 else f"prompt {index}"
            rows.append({"step": step, "index": index, "prompt": prompt, "reward": reward, "guards": guards})
    (folder / "evaluation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def html_of(*folders: Path) -> str:
    html = page.to_html([read_run(folder) for folder in folders])
    Page(html)
    return html


def parts_of(folder: Path) -> str:
    """The text of all that is read from the steps; what is read from config.yaml composes it, and is slow."""
    found = read_run(folder)
    return "".join(Page(part(found)).text for title, part in page.SECTIONS if title != "How to run it again")


def test_the_command_writes_a_page_that_needs_nothing_else(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(run)]) == 0
    html = (run / "report.html").read_text()
    assert capsys.readouterr().out.strip() == str(run / "report.html")
    read = Page(html)
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in read.tags}
    assert not [name for _, attributes in read.tags for name in attributes if name.startswith("on")]
    addresses = [each[name] or "" for _, each in read.tags for name in ("src", "href") if name in each]
    assert addresses and all(each.startswith(("data:image/", "#")) for each in addresses)
    assert "url(" not in page.STYLE and "@import" not in page.STYLE
    for title, _ in page.SECTIONS:
        assert title in read.text
    assert str(run.parent) in read.text, "the command is exact, run_dir too"


def test_the_verdict(run: Path) -> None:
    text = Page(html_of(run)).text
    assert "0.100 -> 0.400 in training" in text
    assert "engine and trainer agreed bit for bit in 4 of 4 steps" in text
    assert "4 of 4 steps" in text and "All 12 cells of 4 steps are exactly 0" in text
    assert "7 held-out images, 3 evaluations; one run, one training seed (0)" in text
    assert "better in 2, worse in 2, equal in 3 of 7 images" in text


def test_the_paired_interval_is_that_of_the_differences() -> None:
    pairs = [(0.0, 0.5), (0.5, 0.5), (0.25, 1.0), (1.0, 0.75)]
    changes = [0.5, 0.0, 0.75, -0.25]
    mean = sum(changes) / 4
    half = 1.96 * math.sqrt(sum((change - mean) ** 2 for change in changes) / 3 / 4)
    told = paired(pairs)
    assert told.startswith(f"{mean:+.3f}, 95 % interval {mean - half:+.3f} to {mean + half:+.3f}, no more than chance")
    assert told.endswith("better in 2, worse in 1, equal in 1 of 4 images (sign test p = 1)")
    assert paired([(0.0, 1.0)] * 4 + [(0.0, 0.0)] * 20).endswith("of 24 images (sign test p = 0.12)"), "2 / 2**4"
    assert paired([(0.0, 1.0)] * 5 + [(1.0, 0.0)]).endswith("(sign test p = 0.22)"), "2 * (1 + 6) / 2**6"
    assert "chance" not in paired([(0.0, 0.9), (0.0, 1.0), (0.1, 1.0)] * 2)
    assert "chance" in paired([(0.0, 0.9), (0.0, 1.0), (0.1, 1.0)]), "three of three: p = 0.25"
    assert paired([(0.0, 1.0)]).startswith("+1.000; better in 1")


@given(count=st.integers(1, 70), height=st.integers(1, 40), width=st.integers(1, 40), seed=st.integers(0, 9))
@settings(deadline=None, max_examples=25)
def test_a_cut_sheet_gives_back_every_pixel(count: int, height: int, width: int, seed: int) -> None:
    images = np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), np.uint8)
    found = cut(image_grid([("a caption", image) for image in images]), count)
    scale = found[0].width // width
    for image, picture in zip(images, found, strict=True):
        assert np.array_equal(np.asarray(picture), image.repeat(scale, axis=0).repeat(scale, axis=1))


def test_a_sheet_of_another_count_is_refused() -> None:
    with pytest.raises(ValueError, match="expected one of 7 images"):
        cut(Image.new("RGB", (100, 100)), 7)
    with pytest.raises(ValueError, match="too small"):
        cut(Image.new("RGB", (4, 4)), 4)


def test_pictures_best_worst_suspects(run: Path) -> None:
    found = read_run(run)
    first, last = found.scores[0], found.scores[4]
    assert pictures.suspicious(first, last, COUNT) == [1], "2 lost sharpness, but gained nothing; 0 gained, and lost nothing"
    assert pictures.largest_loss(first, last, 1) == (pytest.approx(0.8), "sharpness")
    text = Page(html_of(run)).text
    best, worst, suspects = (text.index(word) for word in ("Best: largest gain", "Worst: largest loss", "Suspects: the reward"))
    assert text.index("0: prompt 0") < worst and best < text.index("6: prompt 6") < suspects
    assert "step 4: 0.75 (+0.25; sharpness worse by 80%)" in text and "before: 0.5" in text and "step 2: 0.6" in text
    uri = pictures.data_uri(cut(Image.open(run / "images/evaluation_0004.png").convert("RGB"), COUNT)[0])
    assert uri in html_of(run)


def test_text_from_outside_is_text(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "<b>run"
    shutil.copytree(run, folder)
    steps = [
        line(step, **{"alerts/names": HOSTILE, "stopped": HOSTILE, f"guard/{HOSTILE}": 1.0, "guard/lost": HOSTILE})
        for step in (1, 2)
    ]
    write(folder, [{"step": 0, **evaluated(0)}, *steps, line(4, **evaluated(4))])
    (folder / "command.txt").write_bytes(f"omni-rollout train '{HOSTILE}typed'\n".encode() + b"\xff\n")
    for html in (html_of(folder), html_of(run, folder)):
        read = Page(html)
        assert not {"script", "b"} & {tag for tag, _ in read.tags}
        assert not [name for _, attributes in read.tags for name in attributes if name.startswith("on")]
        assert HOSTILE in read.text and "<b>run" in read.text and f"{HOSTILE}typed" in read.text


def test_what_was_typed_stands_beside_the_command_that_is_composed(run: Path) -> None:
    assert "It was started from Python" in Page(html_of(run)).text
    for words in (["a=b c", "x='y'"], ["trainer.resume=auto"]):
        note_command(run, words)
    text = Page(html_of(run)).text
    assert "omni-rollout train 'a=b c' 'x='\"'\"'y'\"'\"''\nomni-rollout train trainer.resume=auto\n" in text
    assert "It was started from Python" not in text and "omni-rollout train experiment=nano_ocr" in text


def test_the_command_gives_the_configuration_again(run: Path) -> None:
    command = command_of(read_run(run))
    assert not command.doubts and {"trainer.steps", "trainer.learning_rate", "run_dir"} == set(command.differences)
    assert command.words[:3] == ["omni-rollout", "train", "experiment=nano_ocr"]
    assert to_yaml(compose(command.words[2:])) == (run / "config.yaml").read_text()


@pytest.mark.parametrize(
    "overrides",
    [
        ["experiment=nano_ocr", "algorithm=diffusion_nft", "algorithm.mix_beta=0.2"],
        [
            "experiment=nano_ocr",
            "reward.weights={ocr: 0.5, jpeg_compressibility: 2.0}",
            'sampling.negative_prompt="a, b = \\"c\\""',
        ],
        ["model=nano", "prompts=p.txt", "parity=fast", "trainer.lora_rank=4"],
    ],
)
def test_the_command_of_other_runs(run: Path, overrides: list[str]) -> None:
    text = to_yaml(compose(overrides))
    (run / "config.yaml").write_text(text)
    command = command_of(read_run(run))
    assert not command.doubts and to_yaml(compose(command.words[2:])) == text


def test_a_command_that_is_not_exact_says_so(run: Path) -> None:
    path = run / "config.yaml"
    text = path.read_text()
    path.write_text(text.replace("  clip_range: 0.01", "  clip_range: 0.01\n  gone: 3"))
    assert "trainer.gone" in command_of(read_run(run)).doubts[0]
    path.write_text(text.replace("experiment: nano_ocr", "experiment: not_here"))
    assert "not_here" in command_of(read_run(run)).doubts[0]
    evil = run / "evil.py"
    evil.write_text(f"open({str(run / 'ran')!r}, 'w')")
    path.write_text(text.replace("  source: null", f"  source: {evil}:Evil"))
    assert "does not execute" in command_of(read_run(run)).doubts[0]
    html_of(run)
    assert not (run / "ran").exists(), "a page of somebody's run runs none of their code"


def test_digests(run: Path) -> None:
    text = Page(html_of(run)).text
    assert hashlib.sha256((run / "metrics.jsonl").read_bytes()).hexdigest() in text and f"{4:064x}" in text


def no_evaluation(run: Path) -> str:
    write(run, [line(1), line(2)])
    shutil.rmtree(run / "images")
    (run / "evaluation.jsonl").unlink()
    return "no evaluation before and after"


def no_metrics(run: Path) -> str:
    (run / "metrics.jsonl").unlink()
    return "metrics.jsonl holds no step"


def one_step(run: Path) -> str:
    write(run, [line(1)])
    return "fewer than two training steps"


def resumed_in_another_folder(run: Path) -> str:
    write(run, [line(3), line(4, **evaluated(4))])
    return "two evaluations with scores"


def not_finite(run: Path) -> str:
    bad = {"parity/ppo_kl_mb0": None, "actor/grad_norm": None, "critic/rewards/mean": None, "timing_s/update": None}
    write(run, [line(1), line(2, **bad, **{"rollout_corr/logprob_abs_diff/ts_1": None, "evaluation/reward": None})])
    return "Engine and trainer differ: the largest mean gap of a cell is nan"


def forward(run: Path) -> str:
    why = "not applicable: learns from final latents, not from log-probs"
    write(run, [{"step": step, "critic/rewards/mean": 0.1, "actor/ppo_kl/compares": why} for step in (1, 2)])
    return f"Engine against trainer: {why}"


def no_scores(run: Path) -> str:
    (run / "evaluation.jsonl").unlink()
    return "two evaluations with scores"


def half_a_line(run: Path) -> str:
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "criti')
    return "metrics.jsonl: left out 1 of 6 lines that are not what a run writes (6)"


def a_wrong_picture(run: Path) -> str:
    (run / "images/evaluation_0000.png").write_bytes(b"no picture")
    return "evaluation_0000.png cannot be used"


def a_text_for_a_number(run: Path) -> str:
    write(run, [line(1), line(2, **{"critic/rewards/mean": "much"}), line(3)])
    return "left out 1 of 3 lines"


def a_difference(run: Path) -> str:
    write(run, [line(1), line(2, **{"rollout_corr/logprob_abs_diff/ts_1": 3e-5, "parity/bitwise_equal_fraction": 0.5})])
    return "Engine and trainer differ: the largest mean gap of a cell is 3e-05"


def an_alert(run: Path) -> str:
    write(run, [line(1), line(2, **{"alerts/names": "kl_nonzero, seed_reused"}), line(3, **{"alerts/names": "kl_nonzero"})])
    return "kl_nonzero in steps 2, 3, seed_reused in step 2"


LACKS = [
    no_evaluation,
    no_metrics,
    one_step,
    resumed_in_another_folder,
    not_finite,
    forward,
    no_scores,
    half_a_line,
    a_wrong_picture,
    a_text_for_a_number,
    a_difference,
    an_alert,
]


@pytest.mark.parametrize("change", LACKS, ids=lambda change: change.__name__)
def test_what_a_run_lacks_is_said(run: Path, change: Any) -> None:
    expected = change(run)
    assert expected in parts_of(run)


def test_side_by_side(run: Path, tmp_path: Path) -> None:
    other = tmp_path / "other" / "mine"
    shutil.copytree(run, other)
    (other / "config.yaml").write_text(to_yaml(compose(["experiment=nano_ocr", "trainer.steps=4", "trainer.lora_rank=8"])))
    text = Page(html_of(run, other)).text
    assert "Side by side" in text and "mine (1)" in text and "mine (2)" in text
    assert "trainer.lora_rank\n0\n8\n" in text and "trainer.steps\n" not in text[: text.index("How to run it again", 600)]
    with pytest.raises(UserError, match="5 runs: expected at most 4"):
        page.write_report([run] * 5, tmp_path / "x.html")


def test_a_folder_that_is_no_run_is_refused(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for text, told in ((None, "no config.yaml"), ("- a list", "is not what a run writes"), ("a: [", "cannot be read")):
        folder = tmp_path / f"no run {told}"
        folder.mkdir()
        if text:
            (folder / "config.yaml").write_text(text)
        assert main(["report", str(run), str(folder)]) == 2 and not (run / "report.html").exists()
        assert told in capsys.readouterr().err
    assert main(["report", str(tmp_path / "nowhere")]) == 2 and "no such folder" in capsys.readouterr().err
    assert main(["report", str(run), "--out", str(tmp_path)]) == 2 and "it is a folder" in capsys.readouterr().err


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda x: st.lists(x, max_size=3),
    max_leaves=4,
)
KEYS = st.sampled_from(
    ["step", "index", "prompt", "reward", "guards", *line(1), *evaluated(0), "alerts/names", "stopped", "guard/lost"]
)


@given(rows=st.lists(st.dictionaries(KEYS, JSON | st.integers(0, 5) | st.floats(0, 1), max_size=8) | JSON, max_size=6))
@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_the_files_hold_there_is_a_page(run: Path, rows: list[Any]) -> None:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    names = ("metrics.jsonl", "evaluation.jsonl")
    before = [(run / name).read_text() for name in names]
    for name, own in zip(names, before, strict=True):
        (run / name).write_text(own + text)
    parts_of(run)
    for name, own in zip(names, before, strict=True):
        (run / name).write_text(own)
