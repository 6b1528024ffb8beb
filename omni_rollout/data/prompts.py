"""Prompt files in, `Prompt` records and reproducible batches of them out."""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from omni_rollout.errors import UserError
from omni_rollout.models.base.images import describe
from omni_rollout.trajectories import strict_json
from omni_rollout.types import InputImage, Prompt

SUFFIXES = (".txt", ".jsonl", ".parquet")
MAX_DEPTH = 32  # of nested metadata: what the next program that reads or pickles it can still follow
_UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")  # controls but tab and line ends; lone surrogates


def load_prompts(path: str | Path) -> list[Prompt]:
    """Reads a prompt file: .txt (one a line), .jsonl or .parquet (a `prompt` column; every other column is metadata).

    A nested `metadata` object is merged into the metadata; blank lines and null parquet cells are left out. `images`, a path or
    a list of paths from the file's folder, are the prompt's input images.

    Raises:
        UserError: what is wrong, with the file and the line (or parquet row), counted from 1.
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise UserError(f"{path}: suffix {path.suffix!r} is unknown; expected one of {', '.join(SUFFIXES)}")
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    if path.suffix == ".txt":
        prompts = [Prompt(text=printable(line.strip(), where)) for where, line in _lines(path)]
    elif path.suffix == ".jsonl":
        prompts = [_prompt(_parse(line, where), where, path.parent) for where, line in _lines(path)]
    else:
        prompts = [_prompt(row, where, path.parent) for where, row in _parquet_rows(path)]
    if not prompts:
        raise UserError(f"{path}: holds no prompts; expected at least one")
    return prompts


def group_id(prompt: Prompt) -> str:
    """16 hex digits that name a prompt by its text, metadata and the sha256 of its images, the same in every process."""
    images = [[image.sha256 for image in prompt.images]] if prompt.images else []  # without any: as it was before there were
    canonical = json.dumps([prompt.text, dict(prompt.metadata), *images], sort_keys=True, allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


class PromptStream:
    """Endless shuffled batches. A batch depends on the step and the seed alone, so a resumed run needs no state.

    An epoch is as many whole batches as the prompts fill, in an order drawn from (seed, epoch); prompts that would fill
    only part of a batch sit that epoch out. With fewer prompts than a batch, a batch repeats all of them, as evenly as it can.
    """

    def __init__(self, prompts: Sequence[Prompt], prompts_per_step: int, seed: int) -> None:
        if not prompts:
            raise UserError("no prompts given: expected at least one")
        if prompts_per_step < 1:
            raise UserError(f"prompts_per_step={prompts_per_step}: expected at least 1")
        self.prompts = tuple(prompts)
        self.prompts_per_step = prompts_per_step
        self.seed = seed

    def batch(self, step: int) -> list[Prompt]:
        """The `prompts_per_step` prompts of one step, counted from 0."""
        if step < 0:
            raise UserError(f"step={step}: expected 0 or more")
        epoch, position = divmod(step, max(1, len(self.prompts) // self.prompts_per_step))
        order = list(range(len(self.prompts)))
        # A string seed is hashed with SHA-512: neighbouring seeds and epochs are unrelated, on every machine.
        random.Random(f"{self.seed}/{epoch}").shuffle(order)
        first = position * self.prompts_per_step
        return [self.prompts[order[index % len(order)]] for index in range(first, first + self.prompts_per_step)]


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


def _prompt(row: Any, where: str, folder: Path) -> Prompt:
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
    metadata = {key: value for key, value in row.items() if key not in ("prompt", "images", "metadata")}
    nested = row.get("metadata") or {}
    if not isinstance(nested, Mapping):
        raise UserError(f"{where}: `metadata` is {type(nested).__name__}, expected an object")
    twice = metadata.keys() & nested.keys()
    if twice:
        raise UserError(f"{where}: {', '.join(sorted(twice))[:200]} is given both at the top and inside `metadata`; keep one")
    return Prompt(text=text, images=_images(row.get("images"), where, folder), metadata={**metadata, **nested})


def _images(given: Any, where: str, folder: Path) -> tuple[InputImage, ...]:
    paths = [] if given is None else given if isinstance(given, list) else [given]
    found = []
    for path in paths:
        if not isinstance(path, str):
            raise UserError(f"{where}: `images` holds {type(path).__name__}, expected paths of image files")
        try:
            found.append(describe(folder / path))
        except (OSError, ValueError) as error:
            raise UserError(f"{where}: image {path} cannot be read ({error})") from error
    return tuple(found)
