"""Whether a checkpoint in diffusers layout is whole, told from its JSON files and safetensors headers: no weight is read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from omni_rollout.models import families, family_module
from omni_rollout.models.base.sampling import resolve_extra
from omni_rollout.trajectories import strict_json
from omni_rollout.types import RequestError

INDEX = "model_index.json"
CONFIGS = {  # of components without weights; of all others: config.json
    "processor": "preprocessor_config.json",
    "scheduler": "scheduler_config.json",
    "tokenizer": "tokenizer_config.json",
}
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def problems(folder: Path, family: str = "qwen_image", extra: Mapping[str, Any] | None = None) -> Iterator[str]:
    """What engine or trainer would fail on, a line for each.

    Args:
        extra: `sampling.extra`, as it was given.
    """
    spec = family_module(family, "spec")
    try:
        if not (folder / INDEX).is_file():
            yield f"has no {INDEX}, so it is no checkpoint in diffusers layout"
            return
        listed = _read_object(folder / INDEX)
        found = listed.get("_class_name")
        if isinstance(found, str) and found != spec.PIPELINE:
            yield f"{INDEX} says {found}, model.family={family} is {spec.PIPELINE}{_meant(found)}"
        for name in spec.COMPONENTS:
            if not isinstance(listed.get(name), list) or None in listed[name]:
                yield f"{INDEX} names no {name}; expected {', '.join(spec.COMPONENTS)}"
            else:
                yield from _component(folder / name)
        transformer = folder / "transformer" / "config.json"
        if transformer.is_file():
            yield from spec.RULES.misfits(listed, _read_object(transformer), resolve_extra(extra or {}, spec.RULES))
    except RequestError as error:
        yield str(error)
    except _Damaged as error:
        yield str(error)
    except OSError as error:
        yield f"{error.filename} cannot be read ({error.strerror})"


def _meant(pipeline: str) -> str:
    own = [family for family in families() if pipeline == family_module(family, "spec").PIPELINE]
    return f"; give model.family={own[0]}" if own else f", and no family of {', '.join(families())} is that"


class _Damaged(ValueError):
    """A file that cannot be read; the message names it, relative to its checkpoint where it can."""


def _component(folder: Path) -> Iterator[str]:
    name = folder.name
    config = folder / CONFIGS.get(name, "config.json")
    if not folder.is_dir():
        yield f"has no folder {name}/; was it copied whole?"
        return
    if not config.is_file():
        yield f"has no {name}/{config.name}; was it copied whole?"
        return
    try:
        _read_object(config)
        if name == "tokenizer":
            yield from _vocabulary(folder)
        elif name not in CONFIGS:
            yield from _weights(folder, "model" if name == "text_encoder" else "diffusion_pytorch_model")
    except _Damaged as error:
        yield str(error)


def _vocabulary(folder: Path) -> Iterator[str]:
    found = [folder / name for name in ("tokenizer.json", "vocab.json", "spiece.model") if (folder / name).is_file()]
    if not found:
        yield f"{folder.name}/ has neither tokenizer.json nor vocab.json; was it copied whole?"
    for path in found:
        if path.suffix == ".json":
            _read_object(path)


def _weights(folder: Path, stem: str) -> Iterator[str]:
    single, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
    shards: dict[str, set[str]] = {}
    if index.is_file():
        shards = _shards(index)
    elif not single.is_file():
        pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
        yield f"{folder.name}/ has no {single.name}" + (
            f", only {pickles[0]}: pickled weights can run code and are never read; convert them to safetensors"
            if pickles
            else ", nor its index: it has no weights; was it copied whole?"
        )
        return
    missing = sorted(name for name in shards if not (folder / name).is_file())
    if missing:
        yield f"{_short(index)} names {len(shards)} files, of which {len(missing)} missing: {missing[0]}; was it copied whole?"
        return
    for path in sorted(folder.glob("*.safetensors")):  # the engine reads all of them
        lost = shards.get(path.name, set()) - _tensor_names(path)
        if lost:
            yield f"{folder.name}/{path.name} has no tensor {min(lost)}, which {index.name} says is in it ({len(lost)} missing)"


def _shards(index: Path) -> dict[str, set[str]]:
    """File name -> the tensors that the index says are in it."""
    where = _read_object(index).get("weight_map")
    if not isinstance(where, dict) or not where or not all(isinstance(name, str) for name in where.values()):
        raise _Damaged(f"{_short(index)} has no weight_map from tensors to files; was it copied whole?")
    shards: dict[str, set[str]] = {}
    for tensor, name in where.items():
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise _Damaged(f"{_short(index)} names {name!r}; expected a .safetensors file beside it")
        shards.setdefault(name, set()).add(tensor)
    return shards


def _tensor_names(path: Path) -> set[str]:
    """Reads the header; the library compares the sizes in it with the file's."""
    try:
        with safe_open(path, framework="numpy") as file:
            names = set(file.keys())
    except (SafetensorError, OSError) as error:
        raise _Damaged(f"{_short(path)} is damaged ({error}); copy it again") from error
    if not names:
        raise _Damaged(f"{_short(path)} holds no tensors; copy it again")
    return names


def _read_object(path: Path) -> dict[str, Any]:
    try:
        value = strict_json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # or UnicodeDecodeError, which is one
        raise _Damaged(f"{_short(path)} is not JSON ({error}); copy it again") from error
    if not isinstance(value, dict):
        raise _Damaged(f"{_short(path)} holds {type(value).__name__}, expected an object")
    return value


def _short(path: Path) -> str:
    return path.name if path.name == INDEX else f"{path.parent.name}/{path.name}"
