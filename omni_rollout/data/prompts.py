"""Prompt files, folders, datasets and functions in, `Prompt` records out."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from omni_rollout import plugins
from omni_rollout.data.targets import Targets, located
from omni_rollout.errors import UserError
from omni_rollout.models.base.images import describe
from omni_rollout.trajectories import strict_json
from omni_rollout.types import InputImage, Prompt

SUFFIXES = (".txt", ".jsonl", ".parquet")
_HF_STATE = "state.json"  # in every folder that `datasets` saved a dataset to
MAX_DEPTH = 32  # of nested metadata: what the next program that reads or pickles it can still follow
_UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")  # controls but tab and line ends; lone surrogates


def load_prompts(
    source: str | Path | Mapping[str, float], split: str = "train", targets: Targets | None = None
) -> list[Prompt]:
    """Reads a prompt file: .txt (one a line), .jsonl or .parquet (a `prompt` column; every other column is metadata).

    A nested `metadata` object is merged into the metadata; blank lines and null parquet cells are left out. `images`, a path or
    a list of paths from the file's folder (or from `images/` in it), are the prompt's input images.

    A folder has such a file named `SPLIT` or `SPLIT_metadata` (flow_grpo's and Flow-Factory's layout), or is a dataset that
    Hugging Face's `datasets` saved to disk, with or without splits. A function (`plugins`) gives the rows: texts, or
    what a line of jsonl holds; the same ones each time, for a resumed run asks again. A mapping: all of its sources.

    With `targets`, every row must bring those images, which are the prompt's `targets`.

    Raises:
        UserError: what is wrong, with the file and the line (or row), counted from 1.
    """
    if isinstance(source, Mapping):
        return [prompt for part in source for prompt in load_prompts(part, split, targets)]
    if plugins.is_function(str(source)):
        prompts = [_prompt(row, where, Path.cwd(), targets) for where, row in _function_rows(str(source))]
    elif Path(source).is_dir():
        prompts = _from_folder(Path(source), split, targets)
    else:
        prompts = _from_file(Path(source), targets)
    if not prompts:
        raise UserError(f"{source}: holds no prompts; expected at least one")
    return prompts


def prompts_digest(source: str | Mapping[str, float]) -> str:
    """sha256 of a file of prompts; of anything else, of the prompts that it gives, and of a mixture's weights."""
    if isinstance(source, str) and os.path.isfile(source):
        return hashlib.sha256(Path(source).read_bytes()).hexdigest()
    weights = list(source.values()) if isinstance(source, Mapping) else []
    return hashlib.sha256(json.dumps([weights, *map(group_id, load_prompts(source))]).encode()).hexdigest()


def has_split(source: str, split: str) -> bool:
    folder = Path(source)
    return folder.is_dir() and ((folder / split / _HF_STATE).is_file() or _split_file(folder, split) is not None)


def _split_file(folder: Path, split: str) -> Path | None:
    named = (folder / f"{stem}{suffix}" for suffix in (".jsonl", ".parquet", ".txt") for stem in (split, f"{split}_metadata"))
    return next((path for path in named if path.is_file()), None)


def _from_folder(folder: Path, split: str, targets: Targets | None) -> list[Prompt]:
    for saved in (folder, folder / split):
        if (saved / _HF_STATE).is_file():
            return [_prompt(row, where, saved, targets) for where, row in _dataset_rows(saved)]
    path = _split_file(folder, split) or (_split_file(folder, "train") if split == "test" else None)
    if path is None:
        raise UserError(
            f"{folder}: no prompts in this folder; expected {split}.jsonl, .parquet or .txt, {split}_metadata.jsonl, or a "
            "dataset that `datasets` saved to disk"
        )
    return _from_file(path, targets)


def _function_rows(source: str) -> Iterator[tuple[str, Any]]:
    try:
        rows = list(plugins.load_function("prompts", source)())
    except UserError:
        raise
    except (Exception, SystemExit) as error:  # whatever the function of somebody else raises
        raise UserError(f"prompts={source}: raised {type(error).__name__}: {error}") from error
    for number, row in enumerate(rows, start=1):
        where = f"{source}, row {number}"
        yield where, {"prompt": row} if isinstance(row, str) else _as_json(row, where)


def _dataset_rows(saved: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Of a dataset as `datasets` saves it: Arrow streams, named in `state.json`. Nothing in it is executed."""
    import pyarrow

    try:
        state = strict_json.loads((saved / _HF_STATE).read_text(encoding="utf-8"))
        tables = []
        for file in state["_data_files"]:
            with pyarrow.memory_map(str(saved / Path(file["filename"]).name)) as data:
                tables.append(pyarrow.ipc.open_stream(data).read_all())
        rows = pyarrow.concat_tables(tables).to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{saved}: not a dataset that pyarrow can read ({type(error).__name__}: {error})") from error
    yield from _present(rows, saved)


def _from_file(path: Path, targets: Targets | None) -> list[Prompt]:
    if path.suffix not in SUFFIXES:
        raise UserError(f"{path}: suffix {path.suffix!r} is unknown; expected one of {', '.join(SUFFIXES)}")
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    if path.suffix == ".txt":
        return [Prompt(text=printable(line.strip(), where)) for where, line in _lines(path)]
    if path.suffix == ".jsonl":
        return [_prompt(_parse(line, where), where, path.parent, targets) for where, line in _lines(path)]
    return [_prompt(row, where, path.parent, targets) for where, row in _parquet_rows(path)]


def group_id(prompt: Prompt) -> str:
    """16 hex digits that name a prompt by its text, metadata and the sha256 of its images, the same in every process."""
    kinds = (prompt.images, *([prompt.targets] if prompt.targets else []))
    images = [[image.sha256 for image in kind] for kind in kinds] if any(kinds) else []  # none: as it was before there were
    canonical = json.dumps([prompt.text, dict(prompt.metadata), *images], sort_keys=True, allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    for number, raw in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        where = f"{path}, line {number}"
        try:
            line = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{where}: byte {raw[error.start]:#04x} is not UTF-8; save the file as UTF-8 text") from error
        if "\r" in line.removesuffix("\r"):
            raise UserError(f"{where}: a carriage return inside a line; save the file with \\n line ends")
        if line.strip():
            yield where, line


def _parse(line: str, where: str) -> Any:
    try:
        return strict_json.loads(line)
    except ValueError as error:
        raise UserError(f"{where}: not JSON ({error}); found {line.strip()[:60]!r}, expected one object a line") from error


def _parquet_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with path.open("rb") as file:
            rows = pyarrow.parquet.read_table(file).to_pylist()
    except (pyarrow.ArrowException, OSError, OverflowError, ValueError) as error:
        raise UserError(f"{path}: not a parquet file that pyarrow can read ({error})") from error
    yield from _present(rows, path)


def _present(rows: Sequence[dict[str, Any]], path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows without their null cells, each with where it stands."""
    for number, row in enumerate(rows, start=1):
        where = f"{path}, row {number}"
        present = {name: value for name, value in row.items() if value is not None}
        yield where, {name: _as_json(value, f"{where}: column {name!r}") for name, value in present.items()}


def _as_json(value: Any, where: str) -> Any:
    """The value as a JSON file would have given it: a parquet map's tuples are lists."""
    try:
        return json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{where} cannot be written as JSON ({error}); expected text, numbers, lists or structs") from error


def _check_depth(row: Mapping[str, Any], where: str) -> None:
    level: list[Any] = [row]
    for _ in range(MAX_DEPTH):
        parts = [item.values() if isinstance(item, Mapping) else item for item in level if isinstance(item, Mapping | list)]
        level = [inside for part in parts for inside in part]
    if level:
        raise UserError(f"{where}: metadata nested deeper than {MAX_DEPTH} levels; flatten it")


def printable(text: str, where: str) -> str:
    found = _UNPRINTABLE.search(text)
    if found is not None:
        raise UserError(
            f"{where}: the prompt holds {found[0]!r} at character {found.start() + 1}; expected text that can be printed"
        )
    return text


def _prompt(row: Any, where: str, folder: Path, targets: Targets | None) -> Prompt:
    if not isinstance(row, Mapping):
        raise UserError(f"{where}: found {type(row).__name__}, expected an object with a `prompt`")
    if "prompt" not in row:
        raise UserError(f"{where}: no `prompt`; found {', '.join(map(repr, row))[:200] or 'nothing'}")
    text = row["prompt"]
    if not isinstance(text, str):
        raise UserError(f"{where}: `prompt` is {type(text).__name__} {repr(text)[:60]}, expected a string")
    if not text.strip():
        raise UserError(f"{where}: `prompt` is empty")
    printable(text, where)
    _check_depth(row, where)
    own = {"prompt", "images", "metadata", *(targets.columns if targets is not None else ())}
    metadata = {key: value for key, value in row.items() if key not in own}
    nested = row.get("metadata") or {}
    if not isinstance(nested, Mapping):
        raise UserError(f"{where}: `metadata` is {type(nested).__name__}, expected an object")
    twice = metadata.keys() & nested.keys()
    if twice:
        raise UserError(f"{where}: {', '.join(sorted(twice))[:200]} is given both at the top and inside `metadata`; keep one")
    return Prompt(
        text=text,
        images=_images(row.get("images"), where, folder),
        metadata={**metadata, **nested},
        targets=() if targets is None else targets.of(row, where, folder),
    )


def _images(given: Any, where: str, folder: Path) -> tuple[InputImage, ...]:
    paths = [] if given is None else given if isinstance(given, list) else [given]
    found = []
    for path in paths:
        if not isinstance(path, str):
            raise UserError(f"{where}: `images` holds {type(path).__name__}, expected paths of image files")
        try:
            found.append(describe(located(path, folder)))
        except (OSError, ValueError) as error:
            raise UserError(f"{where}: image {path} cannot be read ({error})") from error
    return tuple(found)
