"""The trainer's transformer read tensor by tensor: what diffusers reads, in the checkpoint's own dtypes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import QwenImageTransformer2DModel
from safetensors.torch import load_file, save_file

from omni_rollout.errors import UserError, WeightSyncError
from omni_rollout.models.base.network import WEIGHTS, load_network


@pytest.fixture
def folder(random_checkpoint: Path, tmp_path: Path) -> Path:
    return shutil.copytree(random_checkpoint / "transformer", tmp_path / "transformer")


def test_it_is_what_diffusers_reads(random_checkpoint):
    stock = QwenImageTransformer2DModel.from_pretrained(random_checkpoint, subfolder="transformer")
    for path in (random_checkpoint, random_checkpoint / "transformer"):
        own = load_network(QwenImageTransformer2DModel, str(path))
        left, right = own.state_dict(), stock.state_dict()
        assert left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
        assert dict(own.named_buffers()).keys() == dict(stock.named_buffers()).keys()
        assert torch.equal(own.pos_embed.pos_freqs, stock.pos_embed.pos_freqs) and own.pos_embed.pos_freqs.device.type == "cpu"
        assert all(parameter.requires_grad for parameter in own.parameters())


def test_in_several_files_and_dtypes(folder):
    whole = load_file(folder / WEIGHTS)
    names = sorted(whole)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, chosen in parts.items():
        kind = torch.bfloat16 if file[0] == "a" else torch.float32
        save_file({name: whole[name].to(kind) for name in chosen}, folder / file)
    index = {"weight_map": {name: file for file, chosen in parts.items() for name in chosen}}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    (folder / WEIGHTS).unlink()
    own = load_network(QwenImageTransformer2DModel, str(folder))
    for name, parameter in own.named_parameters():
        kind = torch.bfloat16 if name in parts["a.safetensors"] else torch.float32
        assert parameter.dtype == kind and torch.equal(parameter, whole[name].to(kind))
    (folder / "b.safetensors").unlink()
    with pytest.raises(UserError, match=r"b\.safetensors does not exist"):
        load_network(QwenImageTransformer2DModel, str(folder))


def test_a_missing_tensor_is_named(folder):
    tensors = load_file(folder / WEIGHTS)
    del tensors["proj_out.bias"]
    save_file(tensors, folder / WEIGHTS)
    with pytest.raises(UserError, match=r"has no proj_out\.bias \(1 missing\)"):
        load_network(QwenImageTransformer2DModel, str(folder))


def test_a_file_that_is_replaced_afterwards_changes_nothing(folder):
    own = load_network(QwenImageTransformer2DModel, str(folder))
    before = {name: parameter.detach().clone() for name, parameter in own.named_parameters()}
    with (folder / WEIGHTS).open("r+b") as file:
        file.seek(-4096, 2)
        file.write(b"\xff" * 4096)
    assert all(torch.equal(parameter, before[name]) for name, parameter in own.named_parameters())


def test_held_tensors_are_taken_as_they_are_or_refused(folder):
    whole = load_file(folder / WEIGHTS)
    held = {"proj_out.weight": whole["proj_out.weight"].bfloat16()}
    own = load_network(QwenImageTransformer2DModel, str(folder), held=held)
    assert own.proj_out.weight.data_ptr() == held["proj_out.weight"].data_ptr() and own.proj_out.weight.dtype == torch.bfloat16
    held["proj_out.weight"][0, 0] += 1
    with pytest.raises(WeightSyncError, match=r"proj_out\.weight"):
        load_network(QwenImageTransformer2DModel, str(folder), held=held)
