"""docs/extending.md, carried out: its files are written, its server is started, a step is trained with all of its rewards."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from omni_rollout.launch.compose import compose
from omni_rollout.launch.validate import validate
from omni_rollout.rewards import RewardError
from omni_rollout.train import train

PAGE = (Path(__file__).parents[2] / "docs" / "extending.md").read_text(encoding="utf-8")
FILES = re.findall(r"^```(?:python|toml)\n# (\S+)\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
COMMANDS = [shlex.split(line) for line in re.findall(r"^```bash\n(.*?)\n```", PAGE, re.MULTILINE | re.DOTALL)]
SMALL = ["rollout.group_size=4", "rollout.prompts_per_step=2", "sampling.num_inference_steps=5", "wandb.mode=disabled"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    for name, text in FILES:
        assert len(text.splitlines()) <= 20, f"{name}: twenty lines at most"
        (tmp_path / name).write_text(text)
    return tmp_path


def install(folder: Path) -> None:
    """What `pip install` would make of the page's pyproject.toml, without pip."""
    points = re.search(r'^\[project\.entry-points\."(.*?)"\]\n(.*)', (folder / "pyproject.toml").read_text(), re.MULTILINE)
    assert points is not None
    info = folder / "our_rewards-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: our-rewards\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{points[1]}]\n{points[2].replace(chr(34), '')}\n")


@contextmanager
def server(command: list[str]) -> Iterator[str]:
    port = command.index("--port") + 1
    words = [sys.executable, "-m", "omni_rollout.cli", *command[1:port], "0", *command[port + 1 :]]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield process.stdout.readline().strip().partition(": ")[2]
        process.terminate()


def metrics(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_the_page_as_it_stands(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(folder)
    monkeypatch.syspath_prepend(folder)
    (serving,) = [command for command in COMMANDS if command[:3] == ["omni-rollout", "reward", "serve"]]
    trains = [command[2:] for command in COMMANDS if command[1] == "train"]
    assert len(trains) == 5
    with server(serving) as address:
        weights = {"round": 1.0}
        together: list[str] = ["reward.weights={}"]
        for overrides in trains:
            words = [word.replace("http://127.0.0.1:8300", address) for word in overrides]
            config = compose([*words, "model=nano", "run_dir=run"])
            validate(config)
            weights |= {} if config.reward.weights == {"ocr": 1.0} else config.reward.weights
            together += [word for word in words if word.startswith(("reward.source.", "prompts="))]
        together[0] = f"reward.weights={{{', '.join(f'{name}: {weight}' for name, weight in weights.items())}}}"
        train(compose(["experiment=nano_ocr", "trainer.steps=1", "evaluation.images=0", "run_dir=run", *SMALL, *together]))
    (step,) = metrics(folder / "run")
    means = {name: step[f"critic/rewards/{name}/mean"] for name in ("bright", "calm", "far", "round")}
    assert means["bright"] == means["far"] and means["calm"] == means["round"] and 0 < means["bright"] < 1
    assert step["critic/rewards/mean"] == pytest.approx(sum(means.values()))
    assert step["critic/rewards/failed"] == 0 and step["parity/bitwise_equal_fraction"] == 1.0


FAILING = """
calls = []

def some(images, prompts, metadata):
    calls.append(len(images))
    return [None if image.mean() == min(i.mean() for i in images) else float(image.mean()) for image in images]

def none(images, prompts, metadata):
    raise OSError("no such weights")
"""


def test_an_image_without_a_reward_leaves_its_group_and_the_run_goes_on(folder: Path) -> None:
    (folder / "failing.py").write_text(FAILING)
    given = ["experiment=nano_ocr", "evaluation.images=2", "run_dir=run", *SMALL, "reward.weights={failing: 1.0}"]
    some = [*given, 'reward.source.failing="failing.py:some"', "reward.max_failed=0.3", "trainer.steps=2"]
    train(compose(some))
    before, *steps = metrics(folder / "run")
    assert before["evaluation/failed"] == 1 and "gave None" in str(before["rewards/not_measured"])
    for step in steps:
        assert step["critic/rewards/failed"] == 2, "one of each group: a group is scored in one call"
        assert step["alerts/names"] == "rewards_missing"
        assert "gave None, expected a number" in str(step["rewards/not_scored"])
        assert step["parity/bitwise_equal_fraction"] == 1.0 and step["actor/grad_norm"] > 0
    with pytest.raises(
        RewardError, match=r"8 of 8 images could not be scored, more than reward.max_failed=0.2 .*no such weights"
    ):
        train(compose([*given, 'reward.source.failing="failing.py:none"', "reward.max_failed=0.2", "run_dir=other"]))
    assert Counter(line.get("alerts/names") for line in metrics(folder / "other"))["reward_failed"] == 1
