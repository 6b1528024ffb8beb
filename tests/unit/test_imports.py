"""Commands import torch and the engine with Python's garbage collector at rest."""

from __future__ import annotations

import gc
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from omni_rollout.launch.imports import imported_for_good

# Ends the process at its first import of torch, and says whether the collector is on.
TOLD = """
import gc, os, sys

class Told:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            os.write(1, b"collects" if gc.isenabled() else b"rests")
            os._exit(0)

sys.meta_path.insert(0, Told())
from omni_rollout.cli import main
print(main(sys.argv[1:]))
"""


@pytest.fixture
def unfrozen():
    yield
    gc.unfreeze()


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "experiment=nano_ocr", "run_dir=run"],
        ["train", "experiment=nano_ocr", "run_dir=run", "backend=verl"],
        ["rollout", "model=nano", "prompts=one.txt", "out=out"],
        ["evaluate", "model=nano", "evaluation.prompts=one.txt", "out=out", "reward.weights={jpeg_compressibility: 1.0}"],
        ["serve", "model=nano"],
        ["parity", "model=nano"],
        ["replay", "model=nano", "one.safetensors"],
    ],
    ids=lambda arguments: f"{arguments[0]} {arguments[-1]}",
)
def test_a_command_imports_torch_with_the_collector_at_rest(arguments: list[str], tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("a red square\n")
    save_file({"x": np.zeros(1)}, tmp_path / "one.safetensors", metadata={"format_version": "2"})
    done = subprocess.run([sys.executable, "-c", TOLD, *arguments], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "rests", done.stdout + done.stderr


@pytest.mark.usefixtures("unfrozen")
def test_what_is_there_afterwards_is_left_out() -> None:
    before = gc.get_freeze_count()
    with imported_for_good():
        assert not gc.isenabled()
        made = [[] for _ in range(1000)]
    assert gc.isenabled()
    assert gc.get_freeze_count() >= before + len(made)


@pytest.mark.usefixtures("unfrozen")
def test_the_collector_is_as_it_was_when_an_import_fails() -> None:
    with pytest.raises(ImportError), imported_for_good():
        import no_such_module  # type: ignore[import-not-found]  # noqa: F401
    assert gc.isenabled()


@pytest.mark.usefixtures("unfrozen")
def test_a_collector_that_was_off_stays_off() -> None:
    gc.disable()
    try:
        with imported_for_good():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
