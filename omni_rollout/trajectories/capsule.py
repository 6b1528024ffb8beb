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
from types import NoneType
from typing import Any, NoReturn, get_args

import safetensors
import safetensors.torch
import torch

from omni_rollout.errors import UserError
from omni_rollout.models import families, family_module
from omni_rollout.models.base.sampling import resolve_extra
from omni_rollout.trajectories import strict_json
from omni_rollout.types import InputImage, LogProbForm, Prompt, RequestError, SamplingSpec, SDEType, Trajectory

FORMAT_VERSION = 2
TENSORS = (
    "latents",
    "log_probs",
    "step_indices",
    "sigmas",
    "timesteps",
    "prompt_embeds",
    "prompt_embeds_mask",
    "media",
)
CONDITION = "conditions."
EMBEDDING_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NEGATIVE_TENSORS = ("negative_prompt_embeds", "negative_prompt_embeds_mask")  # present exactly when guidance was on
SPEC_KEYS: dict[str, tuple[type, ...]] = {  # of SamplingSpec; its step_indices are the tensor of that name
    "height": (int,),
    "width": (int,),
    "num_inference_steps": (int,),
    "true_cfg_scale": (float, int),
    "negative_prompt": (str, NoneType),
    "noise_level": (float, int),
    "sde_type": (str,),
    "log_prob_form": (str,),
    "prompt_width": (int,),
    "negative_prompt_width": (int,),
    "family": (str,),
    "extra": (dict,),
}
ONE = {"family": "qwen_image", "extra": {}, "prompt_images": []}  # what a capsule of format 1 does not say
KEYS: dict[str, tuple[type, ...]] = {
    "format_version": (int,),
    **SPEC_KEYS,
    "prompt": (str,),
    "prompt_images": (list,),
    "prompt_metadata": (dict,),
    "seed": (int,),
    "group_id": (str,),
    "member": (int,),
    "policy_version": (int,),
    "fingerprint": (dict,),
}
CHOICES = {"format_version": (1, FORMAT_VERSION), "sde_type": get_args(SDEType), "log_prob_form": get_args(LogProbForm)}


class CapsuleError(UserError):
    """A capsule that cannot be written or read; names the file and the field."""


def save_capsule(trajectory: Trajectory, path: str | Path) -> None:
    """Writes one trajectory; the file appears whole or not at all.

    Raises:
        CapsuleError: a field that breaks the record's contract, or one that JSON would not give back as it is.
    """
    path = Path(path)
    tensors = {name: getattr(trajectory, name) for name in TENSORS if name != "media"}
    tensors["media"] = torch.from_numpy(trajectory.media.copy())
    tensors |= {CONDITION + name: tensor for name, tensor in trajectory.conditions.items()}
    for name in NEGATIVE_TENSORS:
        if getattr(trajectory, name) is not None:
            tensors[name] = getattr(trajectory, name)
    spec = asdict(trajectory.spec)
    if tuple(spec.pop("step_indices")) != tuple(trajectory.step_indices.tolist()):
        _refuse(path, "step_indices", f"{trajectory.step_indices.tolist()}, but the spec says {trajectory.spec.step_indices}")
    values = {
        "format_version": FORMAT_VERSION,
        **spec,
        "prompt": trajectory.prompt.text,
        "prompt_images": [asdict(image) for image in trajectory.prompt.images],
        "prompt_metadata": dict(trajectory.prompt.metadata),
        "fingerprint": dict(trajectory.fingerprint),
        **{name: getattr(trajectory, name) for name in ("seed", "group_id", "member", "policy_version")},
    }
    header = {key: _to_json(path, key, value) for key, value in values.items()}
    _check_values(path, values)
    _check_tensors(path, tensors, trajectory.spec)
    _check_extra(path, trajectory.spec, trajectory.prompt.images)
    # A clone owns its memory: safetensors refuses views that share it, such as rows of one batch.
    owned = {name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    write_whole(path, safetensors.torch.save(owned, metadata=header))


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
    old = header.get("format_version") == "1"
    values = {**ONE, **{key: _from_json(path, key, header) for key in KEYS if not (old and key in ONE)}}
    if old and "image" in tensors:
        tensors["media"] = tensors.pop("image")
    _check_values(path, values)
    indices = tensors.get("step_indices", torch.empty(0)).flatten().tolist()
    spec = SamplingSpec(**{key: values[key] for key in SPEC_KEYS}, step_indices=tuple(indices))
    images = tuple(_input_image(path, image) for image in values["prompt_images"])
    _check_tensors(path, tensors, spec)
    _check_extra(path, spec, images)
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


def _input_image(path: Path, value: Any) -> InputImage:
    names = {field.name: int if field.name in ("height", "width") else str for field in fields(InputImage)}
    if not isinstance(value, dict) or {name: type(entry) for name, entry in value.items()} != names:
        _refuse(path, "prompt_images", f"{repr(value)[:60]}, expected objects with {', '.join(names)}")
    return InputImage(**value)


def write_whole(path: Path, content: bytes) -> None:
    """The file appears whole or not at all."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(content)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _refuse(path: Path, field: str, what: str) -> NoReturn:
    raise CapsuleError(f"{path}: {field}: {what}")


def _to_json(path: Path, key: str, value: Any) -> str:
    try:
        text = json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise CapsuleError(f"{path}: {key}: {repr(value)[:60]} cannot be written as JSON ({error})") from error
    if json.loads(text) != value:
        _refuse(path, key, f"{value!r} would come back from JSON as {json.loads(text)!r}; use lists and string keys")
    return text


def _from_json(path: Path, key: str, header: Mapping[str, str]) -> Any:
    if key not in header:
        _refuse(path, key, f"missing from the header, which has {', '.join(sorted(header)) or 'no metadata'}")
    try:
        return strict_json.loads(header[key])
    except ValueError as error:
        raise CapsuleError(f"{path}: {key}: {header[key][:60]!r} is not JSON ({error})") from error


def _check_values(path: Path, values: Mapping[str, Any]) -> None:
    for key, types in KEYS.items():
        value = values[key]
        if not isinstance(value, types) or isinstance(value, bool):
            names = " or ".join(type_.__name__ for type_ in types)
            _refuse(path, key, f"{repr(value)[:60]} is {type(value).__name__}, expected {names}")
        if key in CHOICES and value not in CHOICES[key]:
            _refuse(path, key, f"{repr(value)[:60]}, expected {' or '.join(map(repr, CHOICES[key]))}")
    _check_spec(path, values)


def _check_spec(path: Path, values: Mapping[str, Any]) -> None:
    """What one number of a spec says about another."""
    if values["family"] not in families():
        _refuse(path, "family", f"{values['family']!r:.60}, expected one of {', '.join(families())}")
    rules = family_module(values["family"], "spec").RULES
    for side in ("height", "width"):
        if values[side] < rules.multiple or values[side] % rules.multiple:
            _refuse(path, side, f"{values[side]}, expected a multiple of {rules.multiple}")
    try:
        if (whole := resolve_extra(values["extra"], rules)) != values["extra"]:
            _refuse(path, "extra", f"{values['extra']}, expected {', '.join(whole)}, each with a value")
    except RequestError as error:
        _refuse(path, "extra", str(error))
    for key in ("num_inference_steps", "prompt_width", "negative_prompt_width"):
        if values[key] < 1:
            _refuse(path, key, f"{values[key]}, expected at least 1")
    level, scale, sde_type = values["noise_level"], values["true_cfg_scale"], values["sde_type"]
    if level < 0 or (level == 0 and sde_type != "ode"):
        _refuse(path, "noise_level", f"{level}, expected more than 0 with sde_type {sde_type}")
    if level > 1 and sde_type == "cps":
        _refuse(path, "noise_level", f"{level}, expected at most 1 with sde_type cps")
    negative = values["negative_prompt"]
    if rules.guided(scale, values["extra"]) != (negative is not None):
        _refuse(path, "true_cfg_scale", f"{scale}, with negative_prompt {negative!r:.60}: above 1 exactly with one")


def _check_extra(path: Path, spec: SamplingSpec, images: tuple[InputImage, ...]) -> None:
    """What the family works out must be what it would work out again, such as the step at which experts change."""
    values = {key: value for key, value in spec.to_json().items() if key not in ("family", "step_indices")}
    try:
        again = family_module(spec.family, "spec").resolve(values, images)
    except RequestError as error:
        _refuse(path, "extra", str(error))
    if again.extra != spec.extra:
        _refuse(path, "extra", f"{dict(spec.extra)}, expected {dict(again.extra)}")


def _check_tensors(path: Path, tensors: Mapping[str, torch.Tensor], spec: SamplingSpec) -> None:
    try:
        layout = family_module(spec.family, "spec").layout(spec)
    except (RequestError, TypeError) as error:  # a parameter that is None, which only a request may leave open
        raise CapsuleError(f"{path}: extra: {dict(spec.extra)} gives no sizes ({error})") from error
    conditions = {CONDITION + name: shape for name, shape in layout.conditions.items()}
    expected = (*TENSORS, *conditions, *(NEGATIVE_TENSORS if spec.guided else ()))
    for name in expected:
        if name not in tensors:
            _refuse(path, name, "missing" + (", though guidance was on" if name in NEGATIVE_TENSORS else ""))
    for name in tensors.keys() - set(expected):
        _refuse(path, name, "unexpected" + (", since guidance was off" if name in NEGATIVE_TENSORS else ""))
    steps, stochastic = spec.num_inference_steps, tensors["log_probs"].numel()
    if stochastic and spec.sde_type == "ode":
        _refuse(path, "step_indices", f"{stochastic} stochastic steps, expected none with sde_type ode")
    _check_layout(path, tensors, "latents", torch.float32, (stochastic + 1, *layout.latent))
    _check_layout(path, tensors, "log_probs", torch.float32, (stochastic,))
    _check_layout(path, tensors, "step_indices", torch.int64, (stochastic,))
    _check_layout(path, tensors, "sigmas", torch.float32, (steps + 1,))
    _check_layout(path, tensors, "timesteps", torch.float32, (steps,))
    _check_layout(path, tensors, "media", torch.uint8, layout.media)
    for name, shape in conditions.items():
        _check_layout(path, tensors, name, None, shape)
        _check_finite(path, tensors, name)
    for name in ("latents", "log_probs", "sigmas", "timesteps"):
        _check_finite(path, tensors, name)
    indices, sigmas = tensors["step_indices"].tolist(), tensors["sigmas"]
    if not all(0 <= index < steps for index in indices) or indices != sorted(set(indices)):
        _refuse(path, "step_indices", f"{indices}, expected rising positions below num_inference_steps={steps}")
    if sigmas[0] > 1 or sigmas[-1] != 0 or not (sigmas[:-1] > sigmas[1:]).all():
        _refuse(path, "sigmas", f"{sigmas.tolist()}, expected numbers that fall from at most 1 to 0")
    if not torch.allclose(tensors["timesteps"], 1000 * sigmas[:-1]):
        _refuse(path, "timesteps", f"{tensors['timesteps'].tolist()}, expected 1000 times the sigmas")
    _check_branch(path, tensors, "prompt_embeds", spec.prompt_width)
    if spec.guided:
        _check_branch(path, tensors, "negative_prompt_embeds", spec.negative_prompt_width)


def _check_finite(path: Path, tensors: Mapping[str, torch.Tensor], name: str) -> None:
    if not tensors[name].isfinite().all():
        _refuse(path, name, "holds numbers that are not finite")


def _check_branch(path: Path, tensors: Mapping[str, torch.Tensor], name: str, width: int) -> None:
    _check_layout(path, tensors, name, None, (width, None))
    _check_finite(path, tensors, name)
    _check_layout(path, tensors, f"{name}_mask", torch.bool, (width,))
    mask = tensors[f"{name}_mask"]
    if not mask.any() or not torch.equal(mask, torch.arange(width) < mask.sum()):
        _refuse(path, f"{name}_mask", "not right padded: expected true for at least one token, then false to the end")


def _check_layout(
    path: Path, tensors: Mapping[str, torch.Tensor], name: str, dtype: torch.dtype | None, shape: tuple[int | None, ...]
) -> None:
    """`dtype` None: one of `EMBEDDING_DTYPES`; a None in `shape`: any size but 0."""
    tensor = tensors[name]
    if tensor.dtype not in EMBEDDING_DTYPES if dtype is None else tensor.dtype != dtype:
        _refuse(path, name, f"{tensor.dtype}, expected {dtype or 'a float type of 16 or 32 bits'}")
    if tensor.ndim != len(shape) or any(
        have == 0 if want is None else have != want for want, have in zip(shape, tensor.shape, strict=True)
    ):
        wanted = ", ".join("any" if want is None else str(want) for want in shape)
        _refuse(path, name, f"shape {list(tensor.shape)}, expected [{wanted}]")
