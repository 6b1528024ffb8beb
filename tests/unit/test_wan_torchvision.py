"""vllm-omni's Wan2.2 without torchvision: a stand-in where it is missing, the real one where it is there, no trace after."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers.utils.import_utils import is_torchvision_available

from omni_rollout.models.wan2_2 import without_torchvision as module
from omni_rollout.models.wan2_2.without_torchvision import NAMES, without_torchvision


def loaded() -> list[str]:
    return [name for name in sys.modules if name.partition(".")[0] == "torchvision"]


@pytest.fixture(autouse=True)
def absent(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No torchvision to begin with, whatever this machine has."""
    for name in loaded():
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if not (Path(entry) / "torchvision").exists()])
    yield
    for name in loaded():
        del sys.modules[name]


def write(folder: Path, text: str) -> None:
    (folder / "torchvision" / "transforms").mkdir(parents=True)
    (folder / "torchvision" / "__init__.py").write_text(text)
    for name in ("__init__", "functional"):
        (folder / "torchvision" / "transforms" / f"{name}.py").write_text("REAL = True\n")


def test_a_stand_in_can_be_imported_and_says_what_is_missing_when_it_is_used():
    with without_torchvision():
        import torchvision.transforms.functional as functional  # pyright: ignore[reportMissingImports]
        from torchvision import transforms  # pyright: ignore[reportMissingImports]

        assert transforms.functional is functional and set(loaded()) == set(NAMES)
        with pytest.raises(ImportError, match=r"torchvision.transforms.functional.to_tensor is needed"):
            functional.to_tensor(None)
    assert not loaded() and not is_torchvision_available()


def test_it_is_gone_also_after_an_import_that_failed():
    with pytest.raises(ZeroDivisionError), without_torchvision():
        raise ZeroDivisionError
    assert not loaded()


def test_the_real_one_is_used_where_it_can_be_imported(tmp_path, monkeypatch):
    write(tmp_path, "")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(module, "version", lambda _: pytest.fail("no stand-in, so nothing to check"))
    with without_torchvision():
        from torchvision.transforms import functional  # pyright: ignore[reportMissingImports]
    assert functional.REAL and "torchvision" in sys.modules


def test_one_built_for_another_torch_counts_as_missing(tmp_path, monkeypatch):
    write(tmp_path, "raise RuntimeError('operator torchvision::nms does not exist')")
    monkeypatch.syspath_prepend(tmp_path)
    with without_torchvision():
        from torchvision.transforms import functional  # pyright: ignore[reportMissingImports]

        assert "REAL" not in vars(functional)
    assert not loaded()


def test_another_vllm_omni_is_refused_by_its_version(monkeypatch):
    versions = {"vllm-omni": "0.30.0", "torch": "2.13.0"}
    monkeypatch.setattr(module, "version", versions.__getitem__)
    told = r"only vllm-omni 0.28.0 is known to work, here is 0.30.0: .* fits torch 2.13.0"
    with pytest.raises(ImportError, match=told), without_torchvision():
        pytest.fail("reached")
    assert not loaded()
