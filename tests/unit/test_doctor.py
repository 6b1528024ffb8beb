from __future__ import annotations

import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from omni_rollout.launch import machine_check
from omni_rollout.launch.doctor import check_optional, check_versions, import_problem

BROKEN = "omni_rollout_broken_example"


@pytest.fixture
def broken_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An installed distribution, seen by this interpreter and those it starts, whose module does not load."""
    (tmp_path / f"{BROKEN}.py").write_text("raise RuntimeError('operator nms does not exist')\n")
    info = tmp_path / f"{BROKEN}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {BROKEN}\nVersion: 1.0\n")
    (info / "RECORD").write_text(f"{BROKEN}.py,,\n{BROKEN}-1.0.dist-info/METADATA,,\n{BROKEN}-1.0.dist-info/RECORD,,\n")
    (info / "INSTALLER").write_text("pip\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    return BROKEN


def test_an_import_is_tried_in_an_interpreter_of_its_own() -> None:
    assert import_problem("import json") is None
    assert import_problem("import no_such_module_here") == "ModuleNotFoundError: No module named 'no_such_module_here'"
    assert import_problem("import os; os._exit(3)") == "exit status 3"
    assert "no_such_module_here" not in sys.modules


def test_versions_are_held_to_the_exact_ones() -> None:
    wanted = ["pytest==0.0.1", "numpy", "no-such-dist==1.0", "no-such-dist==1.0; extra == 'cuda'", "torch==2.13.0"]
    wanted.append("torch==2.13.0; extra == 'cuda'")
    listed = list(check_versions([Requirement(text) for text in wanted]))
    findings = {(finding.name, finding.ok): finding.text for finding in listed}
    assert len(findings) == len(listed)
    assert set(findings) == {("pytest", False), ("no-such-dist", False), ("torch", True)}
    assert findings["pytest", False].endswith("expected ==0.0.1; pip install 'pytest==0.0.1'")
    assert findings["torch", True].startswith("2.13.0")  # a local version such as +cpu is the same version


def test_a_module_that_does_not_load_is_named_with_its_error(broken_module: str) -> None:
    finding = check_optional(broken_module, fix=False)
    assert not finding.ok
    assert "operator nms does not exist" in finding.text and "doctor --fix" in finding.text


def test_fix_does_not_claim_what_pip_did_not_do(broken_module: str, tmp_path: Path) -> None:
    finding = check_optional(broken_module, fix=True)  # it lies outside of the environment, where pip removes nothing
    assert not finding.ok and "could not be uninstalled" in finding.text
    assert (tmp_path / f"{BROKEN}.py").exists()


def test_a_module_that_loads_is_left_alone_and_an_absent_one_is_not_missed() -> None:
    assert check_optional("pytest", fix=True).ok
    assert check_optional("no_such_module_here", fix=True).ok
    assert import_problem("import pytest") is None


def test_what_onednn_says_of_itself_must_agree_with_the_fingerprint(monkeypatch: pytest.MonkeyPatch) -> None:
    told = "Intel AVX-512 with Intel DL Boost and bfloat16 support"
    monkeypatch.setattr(machine_check, "onednn_says", lambda: told)
    ((_, agrees, text),) = machine_check._instruction_set("torch AVX512, oneDNN AVX512_CORE_BF16", "AVX512_CORE_BF16")
    assert agrees and told in text
    ((_, agrees, text),) = machine_check._instruction_set("torch AVX512, oneDNN AVX512_CORE_AMX", "AVX512_CORE_AMX")
    assert not agrees and "AVX512_CORE_BF16: fingerprints name the wrong one" in text
    monkeypatch.setattr(machine_check, "onednn_says", lambda: None)
    ((_, agrees, text),) = machine_check._instruction_set("torch AVX2, oneDNN AVX2", "AVX2")
    assert agrees and "said nothing" in text


@pytest.mark.parametrize("cap", ["AVX2", "AVX512_CORE", ""])
def test_onednn_itself_agrees_here(cap: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from omni_rollout.diffusion.machine import instruction_set, onednn_isa

    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", cap)
    assert all(ok for _, ok, _ in machine_check._instruction_set(instruction_set(), onednn_isa()))


def test_the_layers_of_a_checkpoint_are_read_from_its_headers(random_checkpoint: Path) -> None:
    shapes, heads, head_dim = machine_check._shapes(random_checkpoint)
    assert (heads, head_dim) == (4, 32) and (128, 128) in shapes.values() and (512, 128) in shapes.values()
