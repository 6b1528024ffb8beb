"""What keeps the code readable: sizes, who may import what, and a cheap `import omni_rollout`."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MAX_FILE, MAX_FUNCTION = 300, 60

# Left to right, the way the data flows: a module imports only what stands in rows above its own, or belongs to its own stage.
STAGES = (
    ("errors",),
    ("types", "config", "paths", "outputs", "strict_json"),
    ("schedule", "sde", "guidance", "exact_ops", "digest", "seeds", "stop", "launch", "model_files"),
    ("validate",),
    ("prompts", "capsule"),
    ("models",),  # before collate, which asks a family's spec.py what a request means
    ("collate", "dispatch", "journal"),
    ("rollout",),
    ("rewards", "algorithms", "policy"),
    ("weight_sync", "checkpoints"),
    ("parity", "resume"),
    ("monitor",),
    ("train",),
    ("integrations", "nano", "doctor", "plan"),
    ("cli",),
)
RANK = {stage: rank for rank, row in enumerate(STAGES) for stage in row}

FENCES = {  # library -> the only files that import it
    "vllm": ("omni_rollout/models/*/rollout.py", "omni_rollout/rollout/*"),
    "vllm_omni": ("omni_rollout/models/*/rollout.py", "omni_rollout/rollout/*"),
    "verl": ("omni_rollout/integrations/verl/*",),
    "ray": ("omni_rollout/integrations/verl/*",),
    "wandb": ("omni_rollout/monitor*",),
    "deepspeed": ("omni_rollout/policy/engines/deepspeed_engine.py",),
}


def sources(root: Path) -> Iterator[tuple[str, str]]:
    for folder in ("omni_rollout", "recipes"):
        for path in sorted((root / folder).rglob("*.py")):
            yield path.relative_to(root).as_posix(), path.read_text(encoding="utf-8")


def imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import, also inside functions, under TYPE_CHECKING, or by a literal import_module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.lineno, f"{'.' * node.level}{node.module or ''}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name in ("import_module", "__import__"):
                yield node.lineno, str(node.args[0].value)


def too_large(root: Path) -> Iterator[str]:
    for path, text in sources(root):
        if (lines := len(text.splitlines())) > MAX_FILE:
            yield f"{path}: {lines} lines, expected at most {MAX_FILE}"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > MAX_FUNCTION:
                    yield f"{path}:{node.lineno}: {node.name} has {lines} lines, expected at most {MAX_FUNCTION}"


def over_the_fence(root: Path) -> Iterator[str]:
    for path, text in sources(root):
        for line, name in imports(ast.parse(text)):
            allowed = FENCES.get(name.partition(".")[0])
            if allowed and not any(fnmatch(path, pattern) for pattern in allowed):
                yield f"{path}:{line}: imports {name}, allowed only in {', '.join(allowed)}"


def against_the_flow(root: Path) -> Iterator[str]:
    for path, text in sources(root):
        stage = path.removeprefix("omni_rollout/").removesuffix(".py").split("/")[0]
        if not path.startswith("omni_rollout/") or stage == "__init__":  # a recipe uses all, and so do the public names
            continue
        if stage not in RANK:
            yield f"{path}: stage {stage} has no place in STAGES of {Path(__file__).name}; give it one"
            continue
        for line, name in imports(ast.parse(text)):
            package, _, rest = name.partition(".")
            imported = rest.split(".")[0]
            if name.startswith("."):
                yield f"{path}:{line}: relative import {name}; write omni_rollout..."
            elif package == "omni_rollout" and imported in RANK and imported != stage and RANK[imported] >= RANK[stage]:
                yield f"{path}:{line}: {stage} imports {imported}, which is not to its left"


CHECKS = (too_large, over_the_fence, against_the_flow)


@pytest.mark.parametrize("check", CHECKS)
def test_structure(check: type[Iterator[str]]) -> None:
    assert len(list(sources(ROOT))) > 10
    assert not list(check(ROOT))


@pytest.mark.parametrize(
    ("path", "text", "expected"),
    [
        ("omni_rollout/sde.py", "x = 1\n" * 301, "omni_rollout/sde.py: 301 lines, expected at most 300"),
        ("recipes/a.py", "class A:\n  def f(self):\n" + "    x = 1\n" * 60, "recipes/a.py:2: f has 61 lines, expected"),
        ("omni_rollout/train.py", "def f():\n    import vllm_omni.x", "omni_rollout/train.py:2: imports vllm_omni.x, allowed"),
        ("omni_rollout/models/a/policy.py", "from vllm import x", "omni_rollout/models/a/policy.py:1: imports vllm.x, allowed"),
        ("omni_rollout/train.py", "import_module('ray')", "omni_rollout/train.py:1: imports ray, allowed"),
        ("omni_rollout/integrations/a.py", "import verl", "omni_rollout/integrations/a.py:1: imports verl, allowed"),
        ("omni_rollout/train.py", "import wandb as w", "omni_rollout/train.py:1: imports wandb, allowed"),
        ("recipes/nano/a.py", "from deepspeed.a import b", "recipes/nano/a.py:1: imports deepspeed.a.b, allowed"),
        ("omni_rollout/sde.py", "from omni_rollout.train import x", "omni_rollout/sde.py:1: sde imports train"),
        ("omni_rollout/sde.py", "from omni_rollout import guidance", "omni_rollout/sde.py:1: sde imports guidance"),
        (
            "omni_rollout/models/a/b.py",
            "import omni_rollout.rewards.ocr",
            "omni_rollout/models/a/b.py:1: models imports rewards",
        ),
        ("omni_rollout/sde.py", "from . import types", "omni_rollout/sde.py:1: relative import"),
        ("omni_rollout/helpers.py", "", "omni_rollout/helpers.py: stage helpers has no place"),
    ],
)
def test_the_checks_find_what_is_wrong(tmp_path: Path, path: str, text: str, expected: str) -> None:
    (tmp_path / path).parent.mkdir(parents=True)
    (tmp_path / path).write_text(text)
    found = [line for check in CHECKS for line in check(tmp_path)]
    assert len(found) == 1 and found[0].startswith(expected)


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("omni_rollout/models/a/rollout.py", "import vllm_omni\nfrom omni_rollout.models.a.spec import x\nimport rayon"),
        ("omni_rollout/rollout/platform/cpu.py", "from vllm import x\nfrom omni_rollout.models import a"),
        ("omni_rollout/integrations/verl/a.py", "import ray, verl\nfrom omni_rollout import __version__, train"),
        ("omni_rollout/monitor/wandb_sink.py", "import wandb"),
        ("omni_rollout/policy/engines/deepspeed_engine.py", "import deepspeed"),
        ("omni_rollout/__init__.py", "from omni_rollout.train import x"),
        ("recipes/nano/a.py", "from omni_rollout.cli import main\n" * 300),
    ],
)
def test_the_checks_let_pass_what_is_right(tmp_path: Path, path: str, text: str) -> None:
    (tmp_path / path).parent.mkdir(parents=True)
    (tmp_path / path).write_text(text)
    assert not [line for check in CHECKS for line in check(tmp_path)]


@pytest.mark.parametrize("module", ["omni_rollout", "omni_rollout.config", "omni_rollout.cli", "omni_rollout.types"])
def test_a_cheap_import_loads_nothing_heavy(module: str) -> None:
    heavy = {"torch", "numpy", "diffusers", "transformers", "vllm", "vllm_omni", "ray", "wandb", "deepspeed"}
    code = f"import sys, {module}; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
