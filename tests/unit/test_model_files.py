"""A checkpoint that is not whole is told by component before anything is loaded; and what cannot be written before any work."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from omni_rollout.launch.model_files import problems
from omni_rollout.launch.outputs import file_problem, folder_problem

NAMES = {"text_encoder": "model", "transformer": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model"}
CONFIGS = {"scheduler": "scheduler_config.json", "tokenizer": "tokenizer_config.json"}


def weights(folder: Path, component: str = "transformer") -> Path:
    return folder / component / f"{NAMES[component]}.safetensors"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """The files of a checkpoint, each a few bytes."""
    folder = tmp_path / "model"
    for component in ("scheduler", "text_encoder", "tokenizer", "transformer", "vae"):
        (folder / component).mkdir(parents=True)
        (folder / component / CONFIGS.get(component, "config.json")).write_text("{}")
    for component in NAMES:
        save_file({"a": np.zeros(3, np.float32), "b": np.ones((2, 2), np.float32)}, weights(folder, component))
    (folder / "tokenizer" / "tokenizer.json").write_text("{}")
    (folder / "model_index.json").write_text(json.dumps({part.name: ["library", "Class"] for part in folder.iterdir()}))
    return folder


def shard(folder: Path, component: str = "transformer", **weight_map: str) -> Path:
    """The same weights in two files with an index; returns the index."""
    path = weights(folder, component)
    for name, tensor in load_file(path).items():
        save_file({name: tensor}, path.with_name(f"{path.stem}-{name}.safetensors"))
    path.unlink()
    index = path.with_name(f"{path.name}.index.json")
    names = {name: f"{path.stem}-{name}.safetensors" for name in ("a", "b")}
    index.write_text(json.dumps({"metadata": {}, "weight_map": names | weight_map}))
    return index


def test_whole_checkpoints_pass(model: Path, random_checkpoint: Path) -> None:
    assert not list(problems(random_checkpoint))
    assert not list(problems(model))
    shard(model)
    shard(model, "text_encoder")
    assert not list(problems(model))


def truncate(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


DAMAGES: list[tuple[Callable[[Path], object], str]] = [
    (lambda m: (m / "model_index.json").unlink(), "has no model_index.json"),
    (lambda m: (m / "model_index.json").write_text("{"), "model_index.json is not JSON"),
    (lambda m: (m / "model_index.json").write_text("[]"), "model_index.json holds list, expected an object"),
    (lambda m: (m / "model_index.json").write_bytes(b"\xff"), "model_index.json is not JSON"),
    (lambda m: shutil.rmtree(m / "transformer"), "has no folder transformer/"),
    (lambda m: shutil.rmtree(m / "scheduler"), "has no folder scheduler/"),
    (lambda m: (m / "transformer/config.json").unlink(), "has no transformer/config.json"),
    (lambda m: (m / "scheduler/scheduler_config.json").unlink(), "has no scheduler/scheduler_config.json"),
    (lambda m: (m / "vae/config.json").write_text(""), "vae/config.json is not JSON"),
    (lambda m: (m / "vae/config.json").write_text("[" * 100_000), "vae/config.json is not JSON (nested too deep)"),
    (lambda m: (m / "tokenizer/tokenizer.json").unlink(), "tokenizer/ has neither tokenizer.json nor vocab.json"),
    (lambda m: truncate(m / "tokenizer/tokenizer.json", 1), "tokenizer/tokenizer.json is not JSON"),
    (lambda m: weights(m).unlink(), "transformer/ has no diffusion_pytorch_model.safetensors, nor its index"),
    (lambda m: weights(m, "text_encoder").unlink(), "text_encoder/ has no model.safetensors, nor its index"),
    (lambda m: truncate(weights(m), 0), "transformer/diffusion_pytorch_model.safetensors is damaged"),
    (lambda m: truncate(weights(m), 20), "transformer/diffusion_pytorch_model.safetensors is damaged"),
    (lambda m: truncate(weights(m), -1), "transformer/diffusion_pytorch_model.safetensors is damaged"),
    (lambda m: weights(m, "vae").write_bytes(b"\xff" * 64), "vae/diffusion_pytorch_model.safetensors is damaged"),
    (lambda m: save_file({}, weights(m)), "transformer/diffusion_pytorch_model.safetensors holds no tensors"),
    (
        lambda m: weights(m).rename(weights(m).with_suffix(".bin")),
        "transformer/ has no diffusion_pytorch_model.safetensors, only diffusion_pytorch_model.bin: pickled weights",
    ),
    (lambda m: shard(m).write_text("{}"), "index.json has no weight_map"),
    (lambda m: shard(m, b="../vae/x.safetensors"), "index.json names '../vae/x.safetensors'; expected a .safetensors file"),
    (lambda m: shard(m, b="gone.safetensors"), "names 2 files, of which 1 missing: gone.safetensors"),
    (lambda m: shard(m, c="diffusion_pytorch_model-b.safetensors"), "-b.safetensors has no tensor c, which"),
    (
        lambda m: truncate(shard(m).with_name("diffusion_pytorch_model-b.safetensors"), -1),
        "transformer/diffusion_pytorch_model-b.safetensors is damaged",
    ),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGES, ids=[message[:40] for _, message in DAMAGES])
def test_damage_is_told_in_one_line(model: Path, damage: Callable[[Path], object], message: str) -> None:
    damage(model)
    found = list(problems(model))
    assert len(found) == 1 and message in found[0] and "\n" not in found[0]


def test_every_component_is_told(model: Path) -> None:
    (model / "model_index.json").write_text('{"vae": ["library", "Class"], "tokenizer": [null, null]}')
    truncate(weights(model, "vae"), 5)
    assert [problem.partition(";")[0].partition(" (")[0] for problem in problems(model)] == [
        "model_index.json names no scheduler",
        "model_index.json names no text_encoder",
        "model_index.json names no tokenizer",
        "model_index.json names no transformer",
        "vae/diffusion_pytorch_model.safetensors is damaged",
    ]


@given(data=st.data())
@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_in_any_file_are_told_or_pass(model: Path, data: st.DataObject) -> None:
    path = data.draw(st.sampled_from(sorted(path for path in model.rglob("*") if path.is_file())))
    before = path.read_bytes()
    path.write_bytes(data.draw(st.binary(max_size=40) | st.text(max_size=20).map(str.encode) | st.just(before)))
    found = list(problems(model))
    path.write_bytes(before)
    assert all(isinstance(problem, str) for problem in found)
    assert not list(problems(model))


def test_nothing_heavy_is_loaded_to_tell() -> None:
    code = "import sys, omni_rollout.launch.validate; print('torch' in sys.modules, 'diffusers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False False\n"


def test_a_place_to_write_is_asked_for_and_not_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    before = sorted(tmp_path.rglob("*"))
    for path in (tmp_path, tmp_path / "a" / "b", Path("relative"), tmp_path / "ünï [1] 'q' =x"):
        assert folder_problem(path) is None
        assert file_problem(path / "p.json") is None
    assert file_problem(tmp_path / "file") is None
    assert folder_problem(tmp_path / "file") == f"{tmp_path / 'file'} is no folder; give another path"
    assert folder_problem(tmp_path / "file" / "a" / "b") == f"{tmp_path / 'file'} is no folder; give another path"
    assert file_problem(tmp_path / "file" / "p.json") == f"{tmp_path / 'file'} is no folder; give another path"
    assert folder_problem(tmp_path / "link") == f"{tmp_path / 'link'} is no folder; give another path"
    assert file_problem(tmp_path) == "it is a folder; give the path of a file"
    for problem in (
        folder_problem(Path("/proc/a/b")),
        file_problem(Path("/proc/p.json")),
        file_problem(tmp_path / ("a" * 300)),
    ):
        assert problem is not None and problem.startswith("cannot be written (")
    assert sorted(tmp_path.rglob("*")) == before and (tmp_path / "file").read_text() == "kept"
