"""Every experiment has a page and a row in the index, passes a dry run, and its page says of hardware what plan says."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image

from omni_rollout.cli import main
from omni_rollout.launch.compose import compose
from omni_rollout.nano.random_weights import build_random
from tests.unit.test_reward_models import clip

__all__ = ["clip"]  # the fixture

ROOT = Path(__file__).parents[2]
EXPERIMENTS = sorted(path.stem for path in (ROOT / "configs/experiment").glob("*.yaml"))
FULL_SIZE = [name for name in EXPERIMENTS if not name.startswith("nano_")]
PAGES = sorted((ROOT / "recipes").glob("*/README.md"))
EVIDENCE = ("ran here", "two steps", "dry-run", "not run")
ROW = re.compile(r"^\| \[`(\w+)`\]\((\w+/README\.md)\) \| (.*?) \| (.*?) \| (.*?) ?\|$", re.MULTILINE)
TRAINS = {  # page -> the commands that it gives for its own experiment
    page.parent.name: re.findall(r"^omni-rollout train (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    for page in PAGES
    if page.parent.name in FULL_SIZE
}


def figures() -> ModuleType:
    spec = importlib.util.spec_from_file_location("figures", ROOT / "recipes/figures.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A random checkpoint of the true architecture for every family that a full-size experiment asks for."""
    folder = tmp_path_factory.mktemp("families")
    families = {compose([f"experiment={name}"], unused=["prompts"]).model.family for name in FULL_SIZE}
    return {family: build_random(folder / family, family=family, layers=1) for family in sorted(families)}


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """FILE and FOLDER of the pages: with a text to read, and with a picture; `FOLDER` has a test as well."""
    folder = tmp_path_factory.mktemp("prompts")
    Image.new("RGB", (64, 64), "red").save(folder / "a.png")
    (folder / "FOLDER").mkdir()
    for name in ("train.txt", "test.txt"):
        (folder / "FOLDER" / name).write_text('a red sign that says "42"\n')
    (folder / "FILE.txt").write_text("a cat\n")
    (folder / "FILE.jsonl").write_text(json.dumps({"prompt": "make it blue", "images": ["a.png"]}) + "\n")
    return {name: folder / name for name in ("FOLDER", "FILE.txt", "FILE.jsonl")}


def given(name: str, prompts: dict[str, Path], checkpoints: dict[str, Path], clip: Path) -> list[str]:
    """What a user adds to a full-size experiment, with a random model in place of the published one."""
    config = compose([f"experiment={name}"], unused=["prompts"])
    pictures = config.model.family in ("qwen_image_edit_plus", "wan2_2_i2v")
    kind = "FILE.jsonl" if pictures else "FOLDER" if "ocr" in config.reward.weights else "FILE.txt"
    models = [reward for reward in (*config.reward.weights, *config.evaluation.reward.weights) if reward != "ocr"]
    return [
        f"prompts={prompts[kind]}",
        f"model.path={checkpoints[config.model.family]}",
        *(f"reward.model.{reward}={clip}" for reward in models),
    ]


def test_the_index_has_a_row_for_every_experiment_and_no_other() -> None:
    rows = ROW.findall((ROOT / "recipes/README.md").read_text(encoding="utf-8"))
    assert sorted(row[0] for row in rows) == EXPERIMENTS
    for name, page, _, evidence, _ in rows:
        assert (ROOT / "recipes" / page).is_file() and evidence.startswith(EVIDENCE), name
        assert name in (ROOT / "recipes" / page).read_text(encoding="utf-8"), f"{page} does not speak of {name}"
        if name in FULL_SIZE:
            assert page == f"{name}/README.md"
            assert f"**Evidence: {evidence}.**" in (ROOT / "recipes" / page).read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.parent.name)
def test_the_links_of_a_page_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.parent.name)
def test_a_page_has_the_figures_of_today(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert figures().refreshed(text) == text, "put them in again: python recipes/figures.py"


def test_figures_of_yesterday_are_noticed_and_replaced() -> None:
    command = "    $ omni-rollout plan experiment=nano_ocr gpus=1x80\n"
    page = f"text\n\n{command}    one process, backend=embedded: 1.0 GiB of 80.0 GiB: fits\n\nmore\n"
    found = figures().refreshed(page)
    assert re.fullmatch(rf"text\n\n{re.escape(command)}    one process, .* of 80\.0 GiB: fits\n\nmore\n", found)
    assert found != page
    assert figures().refreshed(found) == found


@pytest.mark.parametrize("name", [name for name in EXPERIMENTS if name not in FULL_SIZE])
def test_a_nano_experiment_passes_a_dry_run(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", f"experiment={name}", f"run_dir={tmp_path}/run", "dry_run=true", "gpus=1x80"]) == 0
    assert "on one GPU of 80 GiB: fits" in capsys.readouterr().out and not (tmp_path / "run").exists()


@pytest.mark.parametrize(("name", "command"), [(name, command) for name, commands in TRAINS.items() for command in commands])
def test_a_command_of_a_full_size_page_passes_a_dry_run(
    name: str,
    command: str,
    checkpoints: dict[str, Path],
    prompts: dict[str, Path],
    clip: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = [word for word in shlex.split(command) if not word.startswith("prompts=")]
    assert words[0] == f"experiment={name}"
    added = [*given(name, prompts, checkpoints, clip), f"run_dir={tmp_path}/run", "dry_run=true"]
    assert main(["train", *words, *added]) == 0
    told = capsys.readouterr().out
    assert f"policy      {'LoRA of rank 64' if name != 'qwen_image_ocr' else 'full weights'}" in told
    assert "no policy was loaded, nothing written" in told and not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", FULL_SIZE)
def test_every_full_size_experiment_has_a_command(name: str) -> None:
    assert TRAINS[name], f"recipes/{name}/README.md gives no `omni-rollout train experiment={name} ...`"


@pytest.mark.parametrize("wrong", ["reward.model.pickscore=/nowhere", "prompts=/nowhere.txt", "model.path=/nowhere"])
def test_a_dry_run_finds_what_is_missing(
    wrong: str, checkpoints: dict[str, Path], prompts: dict[str, Path], clip: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    right = given("qwen_image_pickscore", prompts, checkpoints, clip)
    words = [word for word in right if not word.startswith(wrong.partition("=")[0])]
    assert main(["train", "experiment=qwen_image_pickscore", *words, wrong, "dry_run=true"]) == 2
    assert "/nowhere" in capsys.readouterr().err


@pytest.mark.parametrize("name", FULL_SIZE)
def test_a_dry_run_with_gpus_says_what_plan_says(
    name: str,
    prompts: dict[str, Path],
    checkpoints: dict[str, Path],
    clip: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Of the published sizes: a hub id stands for a model that is not on this machine."""
    monkeypatch.setattr("omni_rollout.launch.validate.constants.HF_HUB_OFFLINE", False)
    split = ["trainer.engine=fsdp2", "trainer.ranks=2"]
    status = main(["plan", f"experiment={name}", *split, "gpus=8x80", "--json", str(tmp_path / "plan.json")])
    plan = json.loads((tmp_path / "plan.json").read_text())
    added = [word for word in given(name, prompts, checkpoints, clip) if not word.startswith("model.path")]
    capsys.readouterr()
    train = ["train", f"experiment={name}", *split, *added, "backend=verl", "rollout.workers=6", f"run_dir={tmp_path}/run"]
    assert main([*train, "dry_run=true", "gpus=8x80"]) == status
    told = capsys.readouterr().out
    rank, engine = (f"{plan[part] / 2**30:.1f} GiB" for part in ("rank_bytes", "engine_bytes"))
    assert f"a trainer rank {rank}, a rollout engine {engine}; 2 ranks and 6 engines on 8 GPUs of 80 GiB" in told
    assert (": fits (" in told) == plan["fits"] == (status == 0)
