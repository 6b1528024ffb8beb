"""What keeps the code readable: sizes, who may import what, and a cheap `import omni_rollout`."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MAX_FILE, MAX_FUNCTION, MAX_TOP = 300, 60, 7

# The rooms, left to right, the way the data flows: a module imports only what stands in rows above its own, or its own room.
STAGES = (
    ("errors",),
    ("types", "config", "plugins"),
    ("algorithms",),  # formulas and their keys, of plain records: what a configuration is checked against
    ("diffusion",),
    ("models",),
    ("trajectories",),  # after models: a capsule asks its family's spec.py for the shapes
    ("launch",),
    ("data",),  # after models: collate asks a family's spec.py what a request means
    ("rollout",),
    ("rewards", "policy"),
    ("run",),  # resume reads what policy has written
    ("parity",),
    ("monitor",),
    ("train",),
    ("integrations", "nano", "plan"),
    ("commands",),
    ("cli",),
)
RANK = {stage: rank for rank, row in enumerate(STAGES) for stage in row}

FENCES = {  # library -> the only files that import it
    "vllm": ("omni_rollout/models/*/rollout.py", "omni_rollout/rollout/*"),
    "vllm_omni": ("omni_rollout/models/*/rollout.py", "omni_rollout/rollout/*"),
    "verl": ("omni_rollout/integrations/verl/*",),
    "ray": ("omni_rollout/integrations/verl/*",),
    "wandb": ("omni_rollout/monitor*",),
    "deepspeed": ("omni_rollout/policy/trainer_engines/deepspeed_engine.py",),
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


def crowded_top(root: Path) -> Iterator[str]:
    top = sorted(path.name for path in (root / "omni_rollout").glob("*.py"))
    if len(top) > MAX_TOP:
        yield f"omni_rollout/: {len(top)} files, expected at most {MAX_TOP} beside the rooms: {', '.join(top)}"


def modules_in_a_circle(root: Path) -> Iterator[str]:
    """Also where an import inside a function hides it: neither module could be read, tested or moved without the other."""
    return circle(module_graph(root))


def rooms_in_a_circle(root: Path) -> Iterator[str]:
    """Whatever STAGES says: there is no order at all."""
    rooms: dict[str, set[str]] = {}
    for module, imported in module_graph(root).items():
        if module != "omni_rollout":  # the public names
            room = module.split(".")[1]
            rooms.setdefault(room, set()).update({name.split(".")[1] for name in imported if "." in name} - {room})
    return circle(rooms)


def module_graph(root: Path) -> dict[str, set[str]]:
    """Module of the package -> modules of the package that it imports by name."""
    texts = {
        path.removesuffix(".py").removesuffix("/__init__").replace("/", "."): text
        for path, text in sources(root)
        if path.startswith("omni_rollout/")
    }
    graph = {}
    for module, text in texts.items():
        names = [name for _, name in imports(ast.parse(text))]
        graph[module] = {name if name in texts else name.rpartition(".")[0] for name in names} & texts.keys() - {module}
    return graph


def circle(graph: dict[str, set[str]]) -> Iterator[str]:
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        yield " imports ".join(reversed(error.args[1]))  # each of these is imported by the next


CHECKS = (too_large, over_the_fence, against_the_flow, crowded_top, modules_in_a_circle, rooms_in_a_circle)


@pytest.mark.parametrize("check", CHECKS)
def test_structure(check: type[Iterator[str]]) -> None:
    assert len(list(sources(ROOT))) > 10
    assert not list(check(ROOT))


@pytest.mark.parametrize(
    ("path", "text", "expected"),
    [
        ("omni_rollout/diffusion/sde.py", "x = 1\n" * 301, "omni_rollout/diffusion/sde.py: 301 lines, expected at most 300"),
        ("recipes/a.py", "class A:\n  def f(self):\n" + "    x = 1\n" * 60, "recipes/a.py:2: f has 61 lines, expected"),
        ("omni_rollout/train.py", "def f():\n    import vllm_omni.x", "omni_rollout/train.py:2: imports vllm_omni.x, allowed"),
        ("omni_rollout/models/a/policy.py", "from vllm import x", "omni_rollout/models/a/policy.py:1: imports vllm.x, allowed"),
        ("omni_rollout/train.py", "import_module('ray')", "omni_rollout/train.py:1: imports ray, allowed"),
        ("omni_rollout/integrations/a.py", "import verl", "omni_rollout/integrations/a.py:1: imports verl, allowed"),
        ("omni_rollout/train.py", "import wandb as w", "omni_rollout/train.py:1: imports wandb, allowed"),
        ("recipes/nano/a.py", "from deepspeed.a import b", "recipes/nano/a.py:1: imports deepspeed.a.b, allowed"),
        (
            "omni_rollout/diffusion/sde.py",
            "from omni_rollout.train import x",
            "omni_rollout/diffusion/sde.py:1: diffusion imports train",
        ),
        (
            "omni_rollout/diffusion/sde.py",
            "from omni_rollout import trajectories",
            "omni_rollout/diffusion/sde.py:1: diffusion imports trajectories",
        ),
        (
            "omni_rollout/models/a/b.py",
            "import omni_rollout.rewards.ocr",
            "omni_rollout/models/a/b.py:1: models imports rewards",
        ),
        ("omni_rollout/diffusion/sde.py", "from . import types", "omni_rollout/diffusion/sde.py:1: relative import"),
        ("omni_rollout/helpers.py", "", "omni_rollout/helpers.py: stage helpers has no place"),
    ],
)
def test_the_checks_find_what_is_wrong(tmp_path: Path, path: str, text: str, expected: str) -> None:
    (tmp_path / path).parent.mkdir(parents=True)
    (tmp_path / path).write_text(text)
    found = [line for check in CHECKS for line in check(tmp_path)]
    assert len(found) == 1 and found[0].startswith(expected)


A_CIRCLE = {
    "omni_rollout/plan/a.py": "def f():\n    from omni_rollout.plan.b import x",
    "omni_rollout/plan/b.py": "import omni_rollout.plan.c",
    "omni_rollout/plan/c.py": "from omni_rollout.plan import a",
}
TWO_ROOMS = {
    "omni_rollout/data/a.py": "from omni_rollout.models.b import x",
    "omni_rollout/models/b.py": "",
    "omni_rollout/models/c.py": "if TYPE_CHECKING:\n    from omni_rollout.data import a",
}


@pytest.mark.parametrize(
    ("files", "found"),
    [
        (A_CIRCLE, {modules_in_a_circle: ["omni_rollout.plan.a", "omni_rollout.plan.b", "omni_rollout.plan.c"]}),
        (TWO_ROOMS, {rooms_in_a_circle: ["data", "models"], against_the_flow: ["models imports data"]}),
        (
            {
                f"omni_rollout/{name}.py": ""
                for name in ("__init__", "cli", "config", "errors", "sde", "seeds", "train", "types")
            },
            {
                crowded_top: ["8 files", "sde.py, seeds.py"],
                against_the_flow: ["stage sde has no place", "stage seeds has no place"],
            },
        ),
    ],
)
def test_the_checks_find_what_is_wrong_between_files(
    tmp_path: Path, files: dict[str, str], found: dict[Callable[[Path], Iterator[str]], list[str]]
) -> None:
    for path, text in files.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    for check in CHECKS:
        told = "\n".join(check(tmp_path))
        assert bool(told) == (check in found) and all(words in told for words in found.get(check, [])), told


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("omni_rollout/models/a/rollout.py", "import vllm_omni\nfrom omni_rollout.models.a.spec import x\nimport rayon"),
        ("omni_rollout/rollout/platform/cpu.py", "from vllm import x\nfrom omni_rollout.models import a"),
        ("omni_rollout/integrations/verl/a.py", "import ray, verl\nfrom omni_rollout import __version__, train"),
        ("omni_rollout/monitor/wandb_sink.py", "import wandb"),
        ("omni_rollout/policy/trainer_engines/deepspeed_engine.py", "import deepspeed"),
        ("omni_rollout/__init__.py", "from omni_rollout.train import x"),
        ("recipes/nano/a.py", "from omni_rollout.cli import main\n" * 300),
    ],
)
def test_the_checks_let_pass_what_is_right(tmp_path: Path, path: str, text: str) -> None:
    (tmp_path / path).parent.mkdir(parents=True)
    (tmp_path / path).write_text(text)
    assert not [line for check in CHECKS for line in check(tmp_path)]


@pytest.mark.parametrize(
    "module", ["omni_rollout", "omni_rollout.config", "omni_rollout.cli", "omni_rollout.types", "omni_rollout.rollout.dispatch"]
)
def test_a_cheap_import_loads_nothing_heavy(module: str) -> None:
    heavy = {"torch", "numpy", "diffusers", "transformers", "vllm", "vllm_omni", "ray", "wandb", "deepspeed"}
    code = f"import sys, {module}; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_the_public_names_are_there_and_cost_nothing_before_they_are_used() -> None:
    code = (
        "import sys, omni_rollout as o\n"
        "assert not {'torch', 'omni_rollout.diffusion'} & set(sys.modules)\n"
        "from omni_rollout import SDEStep, sde_step\n"
        "from omni_rollout.diffusion import sde\n"
        "assert sde_step is sde.sde_step and SDEStep is sde.SDEStep\n"
        "assert set(o.__all__) == set(o._HOMES)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
