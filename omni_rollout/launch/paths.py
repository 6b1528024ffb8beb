"""Where the files that ship with the package lie: inside it when installed, beside it in a source tree."""

from __future__ import annotations

from pathlib import Path

from omni_rollout.errors import UserError

_PACKAGE = Path(__file__).resolve().parents[1]


def config_dir() -> Path:
    """The folder of `train.yaml` and the configuration groups."""
    return _shipped("configs")


def recipe_dir(name: str) -> Path:
    """The folder of one recipe.

    Raises:
        UserError: there is no such recipe.
    """
    recipes = _shipped("recipes")
    known = sorted(path.name for path in recipes.iterdir() if path.is_dir())
    if name not in known:
        raise UserError(f"recipe {name} does not exist; {recipes} has {', '.join(known)}")
    return recipes / name


def _shipped(folder: str) -> Path:
    for path in (_PACKAGE / folder, _PACKAGE.parent / folder):
        if path.is_dir():
            return path
    raise UserError(
        f"{folder}/ is neither in {_PACKAGE} nor beside it: the installation is incomplete; install the package again"
    )
