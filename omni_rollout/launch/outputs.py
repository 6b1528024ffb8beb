"""Whether what a command is to write can be written: asked before its work, so that none is lost. Leaves no trace."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def folder_problem(path: Path, *, new: bool = False) -> str | None:
    """Why `path` can be no folder to write into; None when it can be. Neither it nor its parents need exist.

    Args:
        new: nothing may lie in it yet.
    """
    try:
        place = _existing(path)
        if not place.is_dir():
            return f"{place} is no folder; give another path"
        if new and place == path and any(path.iterdir()):
            return "is not empty, and nothing is written over; give another path"
        with tempfile.TemporaryFile(dir=place):
            return None
    except OSError as error:
        return f"cannot be written ({error.strerror}); give another path"


def file_problem(path: Path) -> str | None:
    """Why `path` can be no file to write; None when it can be. Its parents need not exist."""
    try:
        if path.is_dir():
            return "it is a folder; give the path of a file"
        if path.exists():
            return None if os.access(path, os.W_OK) else "cannot be written (Permission denied); give another path"
    except OSError as error:
        return f"cannot be written ({error.strerror}); give another path"
    return folder_problem(path.parent)


def _existing(path: Path) -> Path:
    """The path itself where there is something, even a link to nothing; else the nearest parent."""
    for place in (path, *path.parents):
        try:
            place.lstat()
            return place
        except (FileNotFoundError, NotADirectoryError):
            continue
    raise FileNotFoundError(2, "No such file or directory", str(path))
