"""Files whose tensors are made one at a time: the bytes of the library's, and no more than one tensor at once."""

from __future__ import annotations

import os
import subprocess
import sys
import weakref
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from huggingface_hub import save_torch_state_dict
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from omni_rollout.policy import checkpoint
from omni_rollout.policy.state import RunState, verify
from omni_rollout.policy.tensor_files import NAMES, Part, Pending, collected, file_part, pending, write_parts

Kinds = Mapping[str, tuple[torch.dtype, list[int]]]
TENSORS = st.dictionaries(
    st.text(min_size=1, max_size=12).filter(lambda name: name != "__metadata__" and name.isprintable()),
    st.tuples(st.sampled_from(sorted(NAMES, key=str)), st.lists(st.integers(0, 5), max_size=3)),
    max_size=6,
)


def tensor(dtype: torch.dtype, shape: list[int]) -> torch.Tensor:
    return torch.arange(torch.Size(shape).numel()).reshape(shape).to(dtype)


@settings(deadline=None)
@given(TENSORS, st.sampled_from([None, {"format": "pt"}]))
def test_the_bytes_are_those_of_the_library(
    tmp_path_factory: pytest.TempPathFactory,
    kinds: Mapping[str, tuple[torch.dtype, list[int]]],
    metadata: dict[str, str] | None,
) -> None:
    folder, tensors = tmp_path_factory.mktemp("t"), {name: tensor(*kind) for name, kind in kinds.items()}
    save_file(tensors, folder / "theirs", metadata)
    write_parts([file_part(folder / "ours", pending(tensors), metadata)])
    theirs, ours = ((folder / name).read_bytes() for name in ("theirs", "ours"))
    assert ours == theirs
    loaded = load_file(folder / "ours")
    assert loaded.keys() == tensors.keys() and all(torch.equal(loaded[name], tensors[name]) for name in tensors)


def test_views_and_transposed_tensors_are_written_as_they_read(tmp_path: Path) -> None:
    base = torch.arange(24.0).reshape(4, 6)
    tensors = {"transposed": base.t(), "rows": base[1:3], "columns": base[:, ::2], "one": base[2, 3]}
    write_parts([file_part(tmp_path / "t", pending(tensors))])
    loaded = load_file(tmp_path / "t")
    assert all(torch.equal(loaded[name], value) for name, value in tensors.items())


@pytest.mark.parametrize("size", ["5GB", 200])
def test_a_network_has_the_files_of_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: str | int) -> None:
    monkeypatch.setattr(checkpoint, "FILE_SIZE", size)
    weights = {f"{name}.weight": torch.randn(5, 6) for name in "cab"} | {"bias": torch.randn(3)}
    for name in ("ours", "theirs"):
        (tmp_path / name).mkdir()
    checkpoint.save_transformer(tmp_path / "ours", Configured(), weights)
    save_torch_state_dict(weights, tmp_path / "theirs", filename_pattern=checkpoint.WEIGHTS, max_shard_size=size)
    files = {path.name for path in (tmp_path / "theirs").iterdir()}
    assert files | {"config.json"} == {path.name for path in (tmp_path / "ours").iterdir()}
    assert len(files) == (1 if size == "5GB" else 4)
    assert all((tmp_path / "ours" / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes() for name in files)


class Configured(nn.Module):
    full = False

    def save_config(self, folder: Path) -> None:
        if self.full:
            raise OSError("no space left on device")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text("{}")


def test_one_tensor_is_there_at_a_time(tmp_path: Path) -> None:
    alive: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()
    most = 0

    def make() -> torch.Tensor:
        nonlocal most
        made = torch.ones(3)
        alive.add(made)
        most = max(most, len(alive))
        return made

    write_parts([file_part(tmp_path / "t", {str(number): Pending((3,), torch.float32, make) for number in range(5)})])
    assert len(load_file(tmp_path / "t")) == 5 and most == 1


def test_where_writing_fails_every_tensor_is_made_all_the_same(tmp_path: Path) -> None:
    made: list[str] = []

    def one(name: str) -> Pending:
        return Pending((2,), torch.float32, lambda: made.append(name) or torch.zeros(2))

    def refuse(tensors: Iterator[torch.Tensor]) -> None:
        next(tensors)
        raise OSError("no space")

    with pytest.raises(OSError, match="no space"):
        write_parts([Part([one("a"), one("b")], refuse), file_part(tmp_path / "t", {"c": one("c")})])
    assert made == ["a", "b", "c"] and not (tmp_path / "t").exists()


def rank(number: int, folder: Path) -> None:
    """Of two, which join their parts; the first rank's disk is full once."""
    dist.init_process_group("gloo", store=dist.FileStore(str(folder / "store"), 2), rank=number, world_size=2)
    mine = {name: torch.full((3,), float(number + place)) for place, name in enumerate("ba")}

    def joined(part: torch.Tensor) -> torch.Tensor:
        whole = torch.empty(6)
        dist.all_gather_into_tensor(whole, part)
        return whole

    tensors = {name: Pending((6,), part.dtype, partial(joined, part)) for name, part in mine.items()}
    step = pending({"step": torch.tensor(4)})
    save = partial(checkpoint.save_policy, folder / "c", Configured(), tensors, optimizer={**tensors, **step})
    Configured.full = True
    if number == 0:
        with pytest.raises(OSError, match="no space"):
            save(run=RunState(step=1, weights="w"))
        assert not list(folder.glob("*c*"))
    else:
        save(run=RunState(step=1, weights="w"))
    Configured.full = False
    save(run=RunState(step=2, weights="w"))
    assert collected(tensors).keys() == (set() if number else set("ab"))
    dist.destroy_process_group()


def test_ranks_join_their_parts_and_the_first_writes(tmp_path: Path) -> None:
    processes = [subprocess.Popen([sys.executable, __file__, str(tmp_path), str(number)]) for number in range(2)]
    assert [process.wait(120) for process in processes] == [0, 0]
    loaded = load_file(tmp_path / "c" / checkpoint.OPTIMIZER)
    expected = {"b": [0.0] * 3 + [1.0] * 3, "a": [1.0] * 3 + [2.0] * 3}
    assert {name: loaded[name].tolist() for name in "ab"} == expected and int(loaded["step"]) == 4
    assert verify(tmp_path / "c").step == 2


if __name__ == "__main__":
    rank(int(sys.argv[2]), Path(sys.argv[1]))
    os._exit(0)  # Python's own end may stop gloo's thread in the middle of freeing a tensor: SIGABRT (torch 2.13)
