"""Capsules: a Trajectory as one safetensors file that any trainer, on any machine, can replay.

The tensors carry the names of the record's fields, those of `conditions` as `conditions.NAME`, and the header holds everything
else, each value a JSON string. Names are public API: a change of meaning is a new `FORMAT_VERSION`. Format 1, of Qwen-Image
alone, had no conditions, no `family`, `extra` and `prompt_images`, and called the media `image`; it is read, no longer written.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

from omni_rollout.trajectories import strict_json
from omni_rollout.trajectories.contract import (
    CONDITION,
    FORMAT_VERSION,
    KEYS,
    NEGATIVE_TENSORS,
    ONE,
    SPEC_KEYS,
    TENSORS,
    CapsuleError,
    check_extra,
    check_tensors,
    check_values,
    refuse,
)
from omni_rollout.types import InputImage, Prompt, SamplingSpec, Trajectory

_ENCODER = json.JSONEncoder(allow_nan=False)  # json.dumps makes a new one for each of the twenty texts of a capsule

__all__ = ["FORMAT_VERSION", "KEYS", "CapsuleError", "decode_capsule", "encode_capsule", "load_capsule", "save_capsule"]


def save_capsule(trajectory: Trajectory, path: str | Path) -> None:
    """Writes one trajectory; the file appears whole or not at all.

    Raises:
        CapsuleError: a field that breaks the record's contract, or one that JSON would not give back as it is.
    """
    write_whole(Path(path), encode_capsule(trajectory, path))


def encode_capsule(trajectory: Trajectory, where: object = "trajectory") -> bytes:
    """What `save_capsule` writes; `where` names it in errors."""
    return serialized(*packed(trajectory, where))


def serialized(tensors: Mapping[str, torch.Tensor], header: dict[str, str]) -> bytes:
    """What `packed` returns, as a safetensors file.

    By the library's serializer: its front for torch, which takes six times as long, looks for what `packed` has seen to.
    """
    here = {name: tensor.cpu() for name, tensor in tensors.items()}
    specs = {
        name: safetensors.TensorSpec(
            dtype=str(tensor.dtype).removeprefix("torch."),
            shape=list(tensor.shape),
            data_ptr=tensor.data_ptr(),
            data_len=tensor.nbytes,
        )
        for name, tensor in here.items()
    }
    return bytes(safetensors.serialize(specs, metadata=header))


def load_capsule(path: str | Path) -> Trajectory:
    """Reads one trajectory, equal to the saved one bit for bit.

    Raises:
        CapsuleError: no such file, or anything in it that breaks the record's contract.
    """
    path = Path(path)
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no mapping
    except (safetensors.SafetensorError, OSError) as error:
        raise CapsuleError(f"{path}: not a readable safetensors file ({error}); was it copied whole?") from error
    return unpacked(tensors, header, path)


def decode_capsule(content: bytes, where: object = "capsule") -> Trajectory:
    """`load_capsule` of bytes."""
    try:
        tensors = safetensors.torch.load(content)
    except safetensors.SafetensorError as error:
        raise CapsuleError(f"{where}: not readable safetensors ({error}); did all of it arrive?") from error
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])  # it has just been read once
    return unpacked(tensors, header.get("__metadata__", {}), where)


def packed(trajectory: Trajectory, where: object) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors, each alone in its memory, and header of a capsule."""
    tensors = {name: getattr(trajectory, name) for name in TENSORS if name != "media"}
    media = trajectory.media
    tensors["media"] = torch.from_numpy(media if media.flags.writeable and media.flags.c_contiguous else media.copy())
    tensors |= {CONDITION + name: tensor for name, tensor in trajectory.conditions.items()}
    for name in NEGATIVE_TENSORS:
        if getattr(trajectory, name) is not None:
            tensors[name] = getattr(trajectory, name)
    spec = dict(vars(trajectory.spec))
    if tuple(spec.pop("step_indices")) != tuple(trajectory.step_indices.tolist()):
        refuse(where, "step_indices", f"{trajectory.step_indices.tolist()}, but the spec says {trajectory.spec.step_indices}")
    values = {
        "format_version": FORMAT_VERSION,
        **spec,
        "prompt": trajectory.prompt.text,
        "prompt_images": [asdict(image) for image in trajectory.prompt.images],
        "prompt_metadata": dict(trajectory.prompt.metadata),
        "fingerprint": dict(trajectory.fingerprint),
        **{name: getattr(trajectory, name) for name in ("seed", "group_id", "member", "policy_version")},
    }
    header = {key: _to_json(where, key, value) for key, value in values.items()}
    check_values(where, values)
    check_tensors(where, tensors, trajectory.spec)
    check_extra(where, trajectory.spec, trajectory.prompt.images)
    return _owned(tensors), header


def _owned(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """safetensors refuses views that share their memory, such as rows of one batch: those are copied."""
    owned, seen = {}, set[int]()
    for name, tensor in tensors.items():
        tensor = tensor.detach()
        storage = tensor.untyped_storage()
        if not tensor.is_contiguous() or storage.nbytes() != tensor.nbytes or storage.data_ptr() in seen:
            tensor = tensor.clone(memory_format=torch.contiguous_format)
        seen.add(storage.data_ptr())
        owned[name] = tensor
    return owned


def unpacked(tensors: dict[str, torch.Tensor], header: Mapping[str, str], where: object) -> Trajectory:
    """Raises CapsuleError, as `load_capsule` does."""
    old = header.get("format_version") == "1"
    values = {**ONE, **{key: _from_json(where, key, header) for key in KEYS if not (old and key in ONE)}}
    if old and "image" in tensors:
        tensors["media"] = tensors.pop("image")
    check_values(where, values)
    indices = tensors.get("step_indices", torch.empty(0)).flatten().tolist()
    spec = SamplingSpec(**{key: values[key] for key in SPEC_KEYS}, step_indices=tuple(indices))
    images = tuple(_input_image(where, image) for image in values["prompt_images"])
    check_tensors(where, tensors, spec)
    check_extra(where, spec, images)
    media = tensors.pop("media").numpy()
    return Trajectory(
        **{name: tensors.get(name) for name in (*TENSORS, *NEGATIVE_TENSORS) if name != "media"},  # type: ignore[arg-type]
        conditions={name.removeprefix(CONDITION): tensors[name] for name in tensors if name.startswith(CONDITION)},
        media=media,
        prompt=Prompt(
            text=values["prompt"],
            images=images,
            metadata=values["prompt_metadata"],
        ),
        spec=spec,
        fingerprint=values["fingerprint"],
        **{name: values[name] for name in ("seed", "group_id", "member", "policy_version")},
    )


def _input_image(where: object, value: Any) -> InputImage:
    names = {field.name: int if field.name in ("height", "width") else str for field in fields(InputImage)}
    if not isinstance(value, dict) or {name: type(entry) for name, entry in value.items()} != names:
        refuse(where, "prompt_images", f"{repr(value)[:60]}, expected objects with {', '.join(names)}")
    return InputImage(**value)


def write_whole(path: Path, content: bytes) -> None:
    """The file appears whole or not at all."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(content)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _to_json(where: object, key: str, value: Any) -> str:
    try:
        text = _ENCODER.encode(value)
    except (TypeError, ValueError, RecursionError) as error:
        raise CapsuleError(f"{where}: {key}: {repr(value)[:60]} cannot be written as JSON ({error})") from error
    if (back := strict_json.loads(text)) != value:
        refuse(where, key, f"{value!r} would come back from JSON as {back!r}; use lists and string keys")
    return text


def _from_json(where: object, key: str, header: Mapping[str, str]) -> Any:
    if key not in header:
        refuse(where, key, f"missing from the header, which has {', '.join(sorted(header)) or 'no metadata'}")
    try:
        return strict_json.loads(header[key])
    except ValueError as error:
        raise CapsuleError(f"{where}: {key}: {header[key][:60]!r} is not JSON ({error})") from error
