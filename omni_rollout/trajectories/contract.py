"""What a trajectory must be like to be written or read as a capsule: names, types, shapes, and what one says about another."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from math import isclose
from types import NoneType
from typing import Any, NoReturn, get_args

import numpy as np
import torch

from omni_rollout.errors import UserError
from omni_rollout.models import families, family_module
from omni_rollout.models.base.sampling import resolve_extra
from omni_rollout.types import InputImage, LogProbForm, RequestError, SamplingSpec, SDEType

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
    """A capsule that cannot be written or read; names where it is and the field."""


def refuse(where: object, field: str, what: str) -> NoReturn:
    raise CapsuleError(f"{where}: {field}: {what}")


def check_values(where: object, values: Mapping[str, Any]) -> None:
    for key, types in KEYS.items():
        value = values[key]
        if not isinstance(value, types) or isinstance(value, bool):
            names = " or ".join(type_.__name__ for type_ in types)
            refuse(where, key, f"{repr(value)[:60]} is {type(value).__name__}, expected {names}")
        if key in CHOICES and value not in CHOICES[key]:
            refuse(where, key, f"{repr(value)[:60]}, expected {' or '.join(map(repr, CHOICES[key]))}")
    _check_spec(where, values)


def _check_spec(where: object, values: Mapping[str, Any]) -> None:
    """What one number of a spec says about another."""
    if values["family"] not in families():
        refuse(where, "family", f"{values['family']!r:.60}, expected one of {', '.join(families())}")
    rules = family_module(values["family"], "spec").RULES
    for side in ("height", "width"):
        if values[side] < rules.multiple or values[side] % rules.multiple:
            refuse(where, side, f"{values[side]}, expected a multiple of {rules.multiple}")
    try:
        if (whole := resolve_extra(values["extra"], rules)) != values["extra"]:
            refuse(where, "extra", f"{values['extra']}, expected {', '.join(whole)}, each with a value")
    except RequestError as error:
        refuse(where, "extra", str(error))
    for key in ("num_inference_steps", "prompt_width", "negative_prompt_width"):
        if values[key] < 1:
            refuse(where, key, f"{values[key]}, expected at least 1")
    level, scale, sde_type = values["noise_level"], values["true_cfg_scale"], values["sde_type"]
    if level < 0 or (level == 0 and sde_type != "ode"):
        refuse(where, "noise_level", f"{level}, expected more than 0 with sde_type {sde_type}")
    if level > 1 and sde_type == "cps":
        refuse(where, "noise_level", f"{level}, expected at most 1 with sde_type cps")
    negative = values["negative_prompt"]
    if rules.guided(scale, values["extra"]) != (negative is not None):
        refuse(where, "true_cfg_scale", f"{scale}, with negative_prompt {negative!r:.60}: above 1 exactly with one")


def check_extra(where: object, spec: SamplingSpec, images: tuple[InputImage, ...]) -> None:
    """What the family works out must be what it would work out again, such as the step at which experts change."""
    values = {key: value for key, value in spec.to_json().items() if key not in ("family", "step_indices")}
    try:
        again = family_module(spec.family, "spec").resolve(values, images)
    except RequestError as error:
        refuse(where, "extra", str(error))
    if again.extra != spec.extra:
        refuse(where, "extra", f"{dict(spec.extra)}, expected {dict(again.extra)}")


def check_tensors(where: object, tensors: Mapping[str, torch.Tensor], spec: SamplingSpec) -> None:
    try:
        layout = family_module(spec.family, "spec").layout(spec)
    except (RequestError, TypeError) as error:  # a parameter that is None, which only a request may leave open
        raise CapsuleError(f"{where}: extra: {dict(spec.extra)} gives no sizes ({error})") from error
    conditions = {CONDITION + name: shape for name, shape in layout.conditions.items()}
    expected = (*TENSORS, *conditions, *(NEGATIVE_TENSORS if spec.guided else ()))
    for name in expected:
        if name not in tensors:
            refuse(where, name, "missing" + (", though guidance was on" if name in NEGATIVE_TENSORS else ""))
    for name in tensors.keys() - set(expected):
        refuse(where, name, "unexpected" + (", since guidance was off" if name in NEGATIVE_TENSORS else ""))
    steps, stochastic = spec.num_inference_steps, tensors["log_probs"].numel()
    if stochastic and spec.sde_type == "ode":
        refuse(where, "step_indices", f"{stochastic} stochastic steps, expected none with sde_type ode")
    _check_layout(where, tensors, "latents", torch.float32, (stochastic + 1, *layout.latent))
    _check_layout(where, tensors, "log_probs", torch.float32, (stochastic,))
    _check_layout(where, tensors, "step_indices", torch.int64, (stochastic,))
    _check_layout(where, tensors, "sigmas", torch.float32, (steps + 1,))
    _check_layout(where, tensors, "timesteps", torch.float32, (steps,))
    _check_layout(where, tensors, "media", torch.uint8, layout.media)
    for name, shape in conditions.items():
        _check_layout(where, tensors, name, None, shape)
        _check_finite(where, tensors, name)
    for name in ("latents", "log_probs", "sigmas", "timesteps"):
        _check_finite(where, tensors, name)
    indices, sigmas, timesteps = (tensors[name].tolist() for name in ("step_indices", "sigmas", "timesteps"))
    if not all(0 <= index < steps for index in indices) or indices != sorted(set(indices)):
        refuse(where, "step_indices", f"{indices}, expected rising positions below num_inference_steps={steps}")
    if sigmas[0] > 1 or sigmas[-1] != 0 or any(one <= following for one, following in pairwise(sigmas)):
        refuse(where, "sigmas", f"{sigmas}, expected numbers that fall from at most 1 to 0")
    if not all(isclose(timestep, 1000 * sigma, rel_tol=1e-5) for timestep, sigma in zip(timesteps, sigmas[:-1], strict=True)):
        refuse(where, "timesteps", f"{timesteps}, expected 1000 times the sigmas")
    _check_branch(where, tensors, "prompt_embeds", spec.prompt_width)
    if spec.guided:
        _check_branch(where, tensors, "negative_prompt_embeds", spec.negative_prompt_width)


def _check_finite(where: object, tensors: Mapping[str, torch.Tensor], name: str) -> None:
    # By numpy, which does not let the interpreter go for a few numbers: a server's threads wait for each other to have it back.
    if not np.isfinite(tensors[name].float().numpy()).all():
        refuse(where, name, "holds numbers that are not finite")


def _check_branch(where: object, tensors: Mapping[str, torch.Tensor], name: str, width: int) -> None:
    _check_layout(where, tensors, name, None, (width, None))
    _check_finite(where, tensors, name)
    _check_layout(where, tensors, f"{name}_mask", torch.bool, (width,))
    mask = tensors[f"{name}_mask"].tolist()
    if not any(mask) or mask != sorted(mask, reverse=True):
        refuse(where, f"{name}_mask", "not right padded: expected true for at least one token, then false to the end")


def _check_layout(
    where: object, tensors: Mapping[str, torch.Tensor], name: str, dtype: torch.dtype | None, shape: tuple[int | None, ...]
) -> None:
    """`dtype` None: one of `EMBEDDING_DTYPES`; a None in `shape`: any size but 0."""
    tensor = tensors[name]
    if tensor.dtype not in EMBEDDING_DTYPES if dtype is None else tensor.dtype != dtype:
        refuse(where, name, f"{tensor.dtype}, expected {dtype or 'a float type of 16 or 32 bits'}")
    if tensor.shape != shape and (
        tensor.ndim != len(shape)
        or any(have == 0 if want is None else have != want for want, have in zip(shape, tensor.shape, strict=True))
    ):
        wanted = ", ".join("any" if want is None else str(want) for want in shape)
        refuse(where, name, f"shape {list(tensor.shape)}, expected [{wanted}]")
