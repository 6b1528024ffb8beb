"""Rewards of the user's own: found by each kind of name, called within limits, and images that they cannot score."""

from __future__ import annotations

import asyncio
import math
import re
import shlex
import sys
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import omni_rollout.rewards
from omni_rollout import plugins
from omni_rollout.cli import main
from omni_rollout.config import RewardConfig, RewardNormalise
from omni_rollout.errors import UserError
from omni_rollout.launch.compose import compose
from omni_rollout.launch.sources import reward_problems
from omni_rollout.rewards import RewardBatch, RewardError, WeightedSum, get_reward
from omni_rollout.rewards.base.call import scores
from omni_rollout.rewards.base.sum import in_group
from omni_rollout.types import Prompt

SHADES = [np.full((8, 8, 3), 10 * shade, np.uint8) for shade in range(8)]
PROMPTS = [Prompt(text=f"shade {shade}", metadata={"shade": shade}) for shade in range(8)]
MINE = """
    import helper

    def bright(images, prompts, metadata):
        return [float(image.mean()) + helper.NOTHING for image in images]
"""


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    # Another test's module of the same name may have been imported, and its folder be on the path.
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if not (Path(entry) / "mine.py").exists()])
    for module in ("mine", "helper"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    (tmp_path / "helper.py").write_text("NOTHING = 0\n")
    (tmp_path / "mine.py").write_text(textwrap.dedent(MINE))
    return tmp_path / "mine.py"


def summed(source: str, **settings: Any) -> WeightedSum:
    return WeightedSum({"bright": 2.0}, settings=RewardConfig(weights={}, source={"bright": source}, **settings))


def test_a_function_of_a_file_and_of_a_module(mine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = [2.0 * 10 * shade for shade in range(8)]
    assert summed(f"{mine}:bright")(SHADES, PROMPTS).total == expected
    monkeypatch.chdir(mine.parent)
    assert summed("mine.py:bright")(SHADES, PROMPTS).total == expected
    assert summed("mine:bright")(SHADES, PROMPTS).total == expected


def test_a_plain_function_in_a_file_of_this_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copied beside those that come along, which have `make`."""
    monkeypatch.setattr(omni_rollout.rewards, "__path__", [*omni_rollout.rewards.__path__, str(tmp_path)])
    monkeypatch.setattr(plugins, "registered", lambda room: ["plain", "empty"])
    (tmp_path / "plain.py").write_text("def plain(images, prompts, metadata):\n    return [1.0] * len(images)\n")
    (tmp_path / "empty.py").write_text("def other():\n    pass\n")
    assert WeightedSum({"plain": 3.0})(SHADES[:2], PROMPTS[:2]).total == [3.0, 3.0]
    with pytest.raises(UserError, match=r"this reward is read off no model"):
        get_reward("plain", model="x")
    with pytest.raises(UserError, match=r"empty\.py has neither make\(threads\), .* nor empty\(images, .*\.source\.empty="):
        get_reward("empty")


@pytest.mark.parametrize("key", ["reward", "reward.source"])
@pytest.mark.parametrize(
    ("given", "both"),
    [
        ("red.py:red", "'reward.weights={red: 1.0}' reward.source.red=red.py:red"),
        ("a.b:red", "'reward.weights={red: 1.0}' reward.source.red=a.b:red"),
        ("red.py", "'reward.weights={NAME: 1.0}' reward.source.NAME=red.py:NAME"),
        ("http://h:1", "'reward.weights={NAME: 1.0}' reward.source.NAME=http://h:1"),
    ],
)
def test_a_reward_of_ones_own_under_the_wrong_key_is_answered_with_both_right_ones(key: str, given: str, both: str) -> None:
    words = ["model=nano", "prompts=p.txt"]
    with pytest.raises(
        UserError, match=re.escape(f"{key}={given}: a reward of your own needs a name and a weight; give {both}")
    ):
        compose([*words, f"{key}={given}"])
    config = compose([*words, *shlex.split(both)])
    assert list(config.reward.weights) == list(config.reward.source) == [both.partition("{")[2].partition(":")[0]]


def test_a_weight_of_no_reward_names_the_key_of_a_source() -> None:
    (problem,) = reward_problems(compose(["model=nano", "prompts=p.txt", "reward.weights={red: 1.0}"]))
    assert problem.endswith("; one of your own needs its function too: reward.source.red=path/to/file.py:FUNCTION")


def test_an_entry_point_of_another_package(tmp_path: Path, mine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = tmp_path / "others-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: others\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[omni_rollout.rewards]\nlight = mine:bright\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert "light" in plugins.registered("rewards")
    assert WeightedSum({"light": 1.0})(SHADES[:2], PROMPTS[:2]).total == [0.0, 10.0]
    assert compose(["model=nano", "prompts=p.txt", "reward=light"]).reward.weights == {"light": 1.0}


def test_an_entry_point_of_a_package_without_its_module(tmp_path: Path, mine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What setuptools makes, without a word, of a folder with several modules and none that is listed."""
    info = tmp_path / "hollow-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: hollow\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[omni_rollout.rewards]\ngone = nowhere_at_all:bright\nhalf = mine:dark\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name, reason in (("gone", "ModuleNotFoundError"), ("half", "AttributeError")):
        with pytest.raises(UserError, match=rf"{name}: the entry point .* of hollow cannot be loaded: {reason}: .*bring"):
            get_reward(name)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{folder}/mine.py:dark", "no such name in"),
        ("{folder}/other.py:bright", "no such file"),
        ("{folder}/broken.py:bright", "raised as it was read: ZeroDivisionError"),
        ("{folder}/ending.py:bright", "raised as it was read: SystemExit: 7"),
        ("{folder}/broken.py", "expected package.module:function or path/to/file.py:function"),
        ("nowhere.at.all:bright", "raised as it was read: ModuleNotFoundError"),
        ("{folder}/mine:bright", "neither a module nor a file that ends in .py"),
        ("{folder}/mine.py:helper", "helper is module, expected a function"),
        ("http://127.0.0.1:1", "no answer"),
    ],
)
def test_what_is_not_there_is_said_with_its_key(mine: Path, source: str, message: str) -> None:
    (mine.parent / "broken.py").write_text("1 / 0\n")
    (mine.parent / "ending.py").write_text("import sys\nsys.exit(7)\n")
    with pytest.raises(UserError, match=rf"reward\.source\.bright=.*{message}"):
        summed(source.format(folder=mine.parent))


def test_a_source_without_a_weight_and_a_file_that_is_not_there_are_found_before_torch(tmp_path: Path) -> None:
    from omni_rollout.launch.sources import reward_problems

    config = compose(["model=nano", "prompts=p.txt", "reward.source={bright: 'nowhere.py:bright'}"])
    assert list(reward_problems(config)) == [
        "reward.source.bright=nowhere.py:bright: nothing uses it; give reward.weights.bright, or evaluation.reward.weights"
    ]
    config.evaluation.reward.weights = {"bright": 1.0}
    assert list(reward_problems(config)) == [
        "reward.source.bright=nowhere.py:bright: no such file: nowhere.py, or an http(s) address"
    ]
    config.reward.source = {"bright": "http://somewhere"}
    assert list(reward_problems(config)) == []
    config.reward.model = {"brigth": "folder"}
    assert list(reward_problems(config)) == [
        "reward.model.brigth=folder: nothing uses it; give reward.weights.brigth, or evaluation.reward.weights"
    ]


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ("[a.txt,b.txt]", "prompts=['a.txt', 'b.txt']: expected a file, a folder or a function; of several, {SOURCE: WEIGHT"),
        ("3", "prompts=3: expected a file"),
        ("null", "prompts=None: expected a file"),
        ("{}", "prompts={}: no source in it"),
        ("{a.txt: 0}", "prompts: a.txt has the weight 0; expected a number above 0"),
    ],
)
def test_what_is_no_source_of_prompts_is_said(prompts: str, message: str) -> None:
    from omni_rollout.launch.sources import prompt_problems

    assert next(prompt_problems(compose(["model=nano", f"prompts={prompts}"]))).startswith(message)


def plain(images: Sequence[np.ndarray], prompts: Sequence[str], metadata: Sequence[Any]) -> list[float]:
    assert [f"shade {row['shade']}" for row in metadata] == list(prompts)
    return [float(image.mean()) for image in images]


async def later(images: Sequence[np.ndarray], prompts: Sequence[str], metadata: Sequence[Any]) -> list[float]:
    await asyncio.sleep(0.01)
    return plain(images, prompts, metadata)


def array(*given: Any) -> np.ndarray:
    return np.asarray(plain(*given), np.float32)


def tensors(*given: Any) -> list[torch.Tensor]:
    return [torch.tensor(value) for value in plain(*given)]


@pytest.mark.parametrize("reward", [plain, later, array, tensors])
def test_every_way_of_giving_numbers(reward: Any) -> None:
    assert scores("r", reward, SHADES, PROMPTS, 10) == ([10.0 * shade for shade in range(8)], [])
    assert scores("r", reward, [], [], 10) == ([], [])


def failing(how: Any, at: int) -> Any:
    def reward(images: Sequence[np.ndarray], prompts: Sequence[str], metadata: Sequence[Any]) -> list[Any]:
        if callable(how) and any(row["shade"] == at for row in metadata):
            return how(images)
        return [how if row["shade"] == at else float(image.mean()) for image, row in zip(images, metadata, strict=True)]

    return reward


def divide(_: Any) -> list[float]:
    return [1 / 0]


def boom(_: Any) -> list[float]:
    raise RuntimeError("boom \x1b[31m\nsecond line " + "x" * 5000)


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        (None, "gave None, expected a number"),
        (math.nan, "gave nan, expected a finite number"),
        (-math.inf, "gave -inf"),
        ("7", "gave '7', expected a number"),
        (RewardError("cannot see"), "cannot see"),
        (divide, "ZeroDivisionError: division by zero"),
        (boom, "boom \\x1b[31m second line xxx"),
        (lambda images: sys.exit(3), "it called sys.exit(3)"),
        (lambda images: [], "gave 0 scores for 1 images"),
        (lambda images: 3.0, "gave float for 1 images"),
    ],
)
def test_one_image_that_cannot_be_scored_is_lost_alone(how: Any, reason: str) -> None:
    values, failures = scores("mine", failing(how, at=3), SHADES, PROMPTS, 10)
    assert values == [None if shade == 3 else 10.0 * shade for shade in range(8)]
    assert len(failures) == 1 and failures[0].startswith("mine: prompt 'shade 3': ") and reason in failures[0]
    assert failures[0].isprintable() and len(failures[0]) < 400


def test_a_reward_that_is_late_loses_its_images_and_nobody_waits_for_it() -> None:
    start = time.monotonic()
    values, failures = scores("mine", lambda *_: time.sleep(60), SHADES, PROMPTS, 0.2)
    assert values == [None] * 8 and "no answer within reward.timeout=0.2 s" in failures[0]
    assert time.monotonic() - start < 30


def batch_of(**breakdown: list[float | None]) -> RewardBatch:
    return WeightedSum(dict.fromkeys(["ocr", "jpeg_compressibility"], 1.0)).batch(
        {"ocr": breakdown["a"], "jpeg_compressibility": breakdown["b"]}, ["ocr: prompt 'x': broken"]
    )


def test_an_image_without_one_of_its_rewards_has_no_sum() -> None:
    batch = batch_of(a=[1.0, None, 3.0], b=[0.5, 0.5, None])
    assert batch.total == [1.5, None, None] and batch.scored == [0]
    assert batch.of([0]).total == [1.5] and batch.of([0]).breakdown == {"ocr": [1.0], "jpeg_compressibility": [0.5]}


@pytest.mark.parametrize(("failed", "allowed", "stops"), [(0, 0.0, False), (1, 0.0, True), (1, 0.1, False), (2, 0.1, True)])
def test_the_run_stops_past_the_share(failed: int, allowed: float, stops: bool) -> None:
    rewards = WeightedSum({"jpeg_compressibility": 1.0}, settings=RewardConfig(weights={}, max_failed=allowed))
    batch = rewards.batch({"jpeg_compressibility": [None] * failed + [1.0] * (10 - failed)}, ["jpeg: prompt 'x': broken"])
    if stops:
        with pytest.raises(RewardError, match=rf"{failed} of 10 images .* reward.max_failed={allowed:g} .*prompt 'x': broken"):
            rewards.require(batch)
    else:
        rewards.require(batch)


@given(
    groups=st.lists(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=6), min_size=1, max_size=4),
    order=st.randoms(use_true_random=False),
)
@settings(deadline=None, max_examples=50)
def test_each_reward_by_its_own_group(groups: list[list[float]], order: Any) -> None:
    rows = [(value, str(number)) for number, group in enumerate(groups) for value in group]
    order.shuffle(rows)
    found = in_group([value for value, _ in rows], [group for _, group in rows])
    for number, group in enumerate(groups):
        own = np.array(group)
        wanted = np.zeros(len(own)) if np.ptp(own) == 0 else (own - own.mean()) / (np.sqrt(np.var(own)) + 1e-4)
        mine = sorted(value for value, (_, name) in zip(found, rows, strict=True) if name == str(number))
        assert np.allclose(mine, sorted(wanted), atol=1e-6)


def test_normalised_rewards_count_by_their_weights_however_large_they_are() -> None:
    weights = {"ocr": 1.0, "jpeg_compressibility": 0.5}
    settings = RewardConfig(weights={}, normalise=RewardNormalise.group)
    groups = ["a", "a", "b", "b"]
    small, large = [0.0, 1.0, 0.2, 0.4], [5000.0, 1000.0, 10.0, 30.0]
    rewards = WeightedSum(weights, settings=settings)
    batch = rewards.batch({"ocr": small, "jpeg_compressibility": large}, [])
    assert rewards.compared(batch, groups) == pytest.approx([-0.5, 0.5, -1.5, 1.5], abs=2e-3)
    assert WeightedSum(weights).compared(batch, groups) == batch.total == [2500.0, 501.0, 5.2, 15.4]


def test_evaluation_goes_on_without_what_fails_and_measures_what_is_not_trained(mine: Path) -> None:
    source = {"bright": f"{mine}:bright"}
    rewards = WeightedSum(
        {"jpeg_compressibility": 1.0}, settings=RewardConfig(weights={}, source=source), untrained={"bright": 0.5}
    )

    def evaluated(shades: Sequence[np.ndarray], prompts: Sequence[Prompt]) -> tuple[dict[str, float], list[str]]:
        return rewards.evaluate(shades, prompts, rewards(shades, prompts))

    found, failures = evaluated(SHADES[:3], PROMPTS[:3])
    assert found["bright"] == 10.0 and found["untrained"] == 5.0 and "jpeg_compressibility" in found and not failures
    assert set(rewards(SHADES[:1], PROMPTS[:1]).breakdown) == {"jpeg_compressibility"}, "it is not part of the reward"
    rewards.rewards["bright"] = failing(None, at=1)
    found, failures = evaluated(SHADES[:3], PROMPTS[:3])
    assert (found["bright"], found["failed"]) == (10.0, 1.0) and "bright: prompt 'shade 1'" in failures[0]
    rewards.rewards["bright"] = failing(divide, at=1)
    assert evaluated(SHADES[1:2], PROMPTS[1:2])[0].keys() == {"jpeg_compressibility", "failed"}


def test_an_evaluation_scores_nothing_twice_and_says_what_a_rewards_own_evaluation_raises(mine: Path) -> None:
    class Counting:
        calls = 0

        def __call__(self, images: Sequence[np.ndarray], prompts: Sequence[str], metadata: Sequence[Any]) -> list[float]:
            self.calls += 1
            return [1.0 for _ in images]

    rewards, counting = summed(f"{mine}:bright"), Counting()
    rewards.rewards["bright"] = counting
    batch = rewards(SHADES, PROMPTS)
    assert rewards.evaluate(SHADES, PROMPTS, batch) == ({"bright": 1.0}, []) and counting.calls == 1

    def evaluate(*_: Any) -> dict[str, float]:
        raise ValueError("no page to read")

    counting.evaluate = evaluate  # type: ignore[attr-defined]
    found, failures = rewards.evaluate(SHADES, PROMPTS, batch)
    assert found == {"bright": 1.0, "failed": 1.0} and failures == ["bright: its own evaluation: no page to read"]


def test_a_registered_reward_needs_no_file_in_configs() -> None:
    assert compose(["model=nano", "prompts=p.txt", "reward=motion"]).reward.weights == {"motion": 1.0}
    assert get_reward("motion").kinds == {"video"}  # type: ignore[attr-defined]


def test_a_port_that_is_none_is_said(mine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reward", "serve", f"{mine}:bright", "--port", "99999"]) == 2
    assert "--port 99999: cannot listen there" in capsys.readouterr().err
    assert main(["serve", "model=nano", "serve.port=99999"]) == 2
    assert "serve.port=99999: expected 0 to 65535" in capsys.readouterr().err
