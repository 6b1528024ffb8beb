"""docs/adding_a_family.md against the code: what it mentions is there, and what a family is asked for is on it."""

from __future__ import annotations

import ast
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

from omni_rollout.models import families, family_module

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/adding_a_family.md").read_text(encoding="utf-8")
PARTS = {
    part: re.findall(r"`(\w+)`", told) for part, told in re.findall(r"^\| `(\w+)\.py` \| (.*?) \| \w+ \|$", PAGE, re.MULTILINE)
}
CODE = dict(re.findall(r"```python\n# (omni_rollout/models/\S+)\n(.*?)```", PAGE, re.DOTALL))


def asked() -> dict[str, dict[str, str]]:
    """Part -> name that is taken from `family_module(..., part)`, where that is written plainly -> one file that does."""
    found: dict[str, dict[str, str]] = defaultdict(dict)
    for path in sorted((ROOT / "omni_rollout").rglob("*.py")):
        tree, bound = ast.parse(path.read_text(encoding="utf-8")), dict[str, str]()
        for node in ast.walk(tree):
            if isinstance(node, ast.Assign | ast.AnnAssign | ast.NamedExpr) and (part := part_of(node.value, bound)):
                target = node.targets[0] if isinstance(node, ast.Assign) else node.target
                bound[ast.unparse(target)] = part
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and (part := part_of(node.value, bound)):
                found[part][node.attr] = str(path.relative_to(ROOT))
    return found


def part_of(node: ast.expr | None, bound: dict[str, str]) -> str | None:
    if isinstance(node, ast.Call) and ast.unparse(node.func) == "family_module" and len(node.args) == 2:
        part = node.args[1]
        return part.value if isinstance(part, ast.Constant) and isinstance(part.value, str) else None
    return bound.get(ast.unparse(node)) if isinstance(node, ast.Name | ast.Attribute) else None


def test_the_page_has_every_part_and_a_family_without_a_parent_every_file() -> None:
    assert set(PARTS) >= {*asked(), "rollout", "activations"} and len(PARTS) == 9
    for family in families():
        if family_module(family, "spec").PARENT is None:
            folder = ROOT / "omni_rollout/models" / family
            assert not [part for part in PARTS if not (folder / f"{part}.py").is_file()], family


OF_SOME = {"IN_CHANNELS": "wan2_2", "WARM_UP_EXTRA": "qwen_image_edit"}  # asked for by their own relatives alone


def test_what_shared_code_asks_a_family_for_is_on_the_page() -> None:
    found = asked()
    assert {"layout", "resolve", "RULES"} <= found["spec"].keys(), "the search finds what is there"
    missing = {
        f"{part}.{name}": file
        for part, names in found.items()
        for name, file in names.items()
        if name not in PARTS[part] and name not in OF_SOME
    }
    assert not missing


@pytest.mark.parametrize("family", families())
def test_a_family_has_what_the_page_says(family: str) -> None:
    for part, names in PARTS.items():
        if part == "rollout":
            continue
        module = family_module(family, part)
        assert not [name for name in names if not hasattr(module, name)], f"{family}: {part}.py"


def test_a_pipeline_has_what_the_page_says() -> None:
    for family in families():
        module, _, name = family_module(family, "spec").ROLLOUT_PIPELINE.rpartition(".")
        pipeline = getattr(importlib.import_module(module), name)
        names = [one for one in PARTS["rollout"] if one != "RolloutMixin"]
        assert {"encode", "noise", "decode", "call", "encode_target"} <= {*names}
        assert pipeline.family == family and not [one for one in names if not callable(getattr(pipeline, one, None))], family
        own = {one for one in names if getattr(pipeline, one).__qualname__.partition(".")[0] != "RolloutMixin"}
        needed = (
            {*names} - {"warm_up", "install"} - ({"encode_target"} if family_module(family, "spec").KIND != "image" else set())
        )
        assert needed <= own, f"{family}: left to RolloutMixin, which has none: {needed - own}"


def test_the_files_and_folders_that_the_page_names_are_there() -> None:
    named = set(re.findall(r"`((?:omni_rollout|configs|tests|docs)/[\w/.]+)`", PAGE))
    assert len(named) > 15 and not [path for path in named if not (ROOT / path).exists()]
    for path in re.findall(r"\]\(([\w.]+\.md)\)", PAGE):
        assert (ROOT / "docs" / path).is_file(), path
    for path in re.findall(r"^\| `(tests/\S+)`", PAGE, re.MULTILINE):
        assert "families()" in (ROOT / path).read_text(encoding="utf-8"), f"{path} does not ask for all families"
    counted = {"qwen_image_edit_plus": 4, "wan2_2_i2v": 3}  # beside __init__.py
    for family, files in counted.items():
        found = [one for one in (ROOT / "omni_rollout/models" / family).glob("*.py") if one.name != "__init__.py"]
        assert len(found) == files, family


@pytest.mark.slow
def test_the_smallest_family_of_the_page_is_exact(tmp_path: Path) -> None:
    assert len(CODE) == 2
    for folder in ("omni_rollout", "configs"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file, text in CODE.items():
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text(text)
    (tmp_path / "omni_rollout/models/qwen_image_small/__init__.py").touch()
    matrix = ["dtype=bfloat16", "guidance=4.0", "width=natural", "in_flight=3", "images=3", "causes=false"]
    command = [sys.executable, "-m", "omni_rollout.cli", "parity", "model.family=qwen_image_small", "--json", "out.json"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([*command, "--matrix", *matrix], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["model"] == "a random qwen_image_small"
    assert [(cell["kl"], cell["bitwise_equal_fraction"]) for cell in found["cells"]] == [(0.0, 1.0)]
