"""What sampling parameters mean in every family; a family's `spec.py` says its defaults, its sizes and what it has beside."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from omni_rollout.types import InputImage, RequestError, SamplingSpec

ALIASES = {"cfg_scale": "true_cfg_scale"}
OTHER_KEYS = ("negative_prompt", "step_indices", "prompt_width", "negative_prompt_width", "extra")


class Tokenizer(Protocol):
    def __call__(self, text: str) -> Mapping[str, Any]: ...


@dataclass(frozen=True, kw_only=True)
class Extra:
    """One parameter that only some families have."""

    default: Any = None  # None: the family works it out
    types: tuple[type, ...]
    check: Callable[[Any], bool] = lambda _: True
    expected: str = ""  # in words, what `check` lets pass


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What one family lets pass."""

    family: str
    defaults: Mapping[str, Any]  # height, width, num_inference_steps, true_cfg_scale, noise_level, sde_type, log_prob_form
    negative_prompt: str  # with guidance on and none given
    multiple: int  # pixels of height and width
    extra: Mapping[str, Extra]
    images: tuple[int, int] = (0, 0)  # how many a prompt must have, and may have
    empty_prompt: bool = True  # False: an empty text is refused
    masks_padding: bool = True  # False: the network attends to padding, so the text's width is part of what it learned
    guided: Callable[[float, Mapping[str, Any]], bool] = lambda true_cfg_scale, extra: true_cfg_scale > 1
    # (model_index.json, its transformer's config.json, `extra`) -> a line for each thing that keeps it from being sampled so
    misfits: Callable[[Mapping[str, Any], Mapping[str, Any], Mapping[str, Any]], Iterable[str]] = lambda *_: ()


def resolve(parameters: Mapping[str, Any], rules: Rules, images: Sequence[InputImage] = ()) -> SamplingSpec:
    """Makes every number explicit. A key that is absent or None takes the family's default; zero stays zero.

    Args:
        parameters: keys of `SamplingSpec`, or the alias `cfg_scale`. `step_indices` None: all steps but the last.
        images: of the prompt.

    Raises:
        RequestError: an unknown key, or a value that cannot be served, with what was given and what to do.
    """
    given = {ALIASES.get(key, key): value for key, value in parameters.items() if value is not None}
    for key in given:
        if key not in rules.defaults and key not in OTHER_KEYS:
            raise RequestError(f"sampling parameter {key!r}: not known{_near(key, [*rules.defaults, *OTHER_KEYS, *ALIASES])}")
    values = {**rules.defaults, **given}
    if "prompt_width" not in values:
        raise RequestError("prompt_width: not given; set collate.prompt_width to the text width of every prompt")
    check(values, rules)
    check_images(images, rules)
    steps = values["num_inference_steps"]
    stochastic = values["sde_type"] != "ode" and values["noise_level"] > 0
    extra = resolve_extra(values.get("extra", {}), rules)
    guided = rules.guided(values["true_cfg_scale"], extra)
    return SamplingSpec(
        height=values["height"],
        width=values["width"],
        num_inference_steps=steps,
        true_cfg_scale=float(values["true_cfg_scale"]),
        negative_prompt=values.get("negative_prompt", rules.negative_prompt) if guided else None,
        noise_level=float(values["noise_level"]),
        sde_type=values["sde_type"] if stochastic else "ode",
        log_prob_form=values["log_prob_form"],
        step_indices=_stochastic_steps(values.get("step_indices"), steps) if stochastic else (),
        prompt_width=values["prompt_width"],
        negative_prompt_width=values.get("negative_prompt_width", values["prompt_width"]),
        family=rules.family,
        extra=extra,
    )


def resolve_extra(given: Mapping[str, Any], rules: Rules) -> dict[str, Any]:
    """Every parameter of `rules.extra`, given or by default; None where the family must still work it out.

    Raises:
        RequestError: an unknown one, or a value of another type or out of range.
    """
    for key in given:
        if key not in rules.extra:
            known = ", ".join(rules.extra) or "none"
            raise RequestError(
                f"sampling.extra.{key}: {rules.family} has no such parameter{_near(key, rules.extra)}; known: {known}"
            )
    result = {key: extra.default if given.get(key) is None else given[key] for key, extra in rules.extra.items()}
    for key, extra in rules.extra.items():
        value = result[key]
        if value is None:
            continue
        if not isinstance(value, extra.types) or (isinstance(value, bool) and bool not in extra.types):
            names = " or ".join(kind.__name__ for kind in extra.types)
            raise RequestError(f"sampling.extra.{key}={value!r}: expected {names}")
        if not extra.check(value):
            raise RequestError(f"sampling.extra.{key}={value!r}: expected {extra.expected}")
    return result


SQUARE = 1024  # pixels


def width_problem(width: str, rules: Rules) -> str | None:
    """Why `collate.width` cannot be this one; None: it can."""
    if width == "fixed" or rules.masks_padding:
        return None
    return (
        f"collate.width={width}: {rules.family} attends to padding, so the width is part of what it learned; "
        "give collate.width=fixed"
    )


def assumed_images(rules: Rules, extra: Mapping[str, Any]) -> list[InputImage]:
    """For sizes without a prompt at hand: as few as the family takes, or one for each size in `extra`.

    Each has the family's own size; where that follows from the image, a square.
    """
    number = max(rules.images[0], len(extra.get("image_sizes") or ()))
    height, width = (rules.defaults[side] or SQUARE for side in ("height", "width"))
    return [InputImage(path=f"input image {place}", sha256="", height=height, width=width) for place in range(1, number + 1)]


def check(values: Mapping[str, Any], rules: Rules) -> None:
    check_sizes(values, rules.multiple)
    if values["num_inference_steps"] < 2:
        raise RequestError(f"num_inference_steps={values['num_inference_steps']}: expected 2 or more")
    if values["noise_level"] < 0:
        raise RequestError(f"noise_level={values['noise_level']}: expected 0 (deterministic) or more")
    if values["sde_type"] == "cps" and values["noise_level"] > 1:
        raise RequestError(f"noise_level={values['noise_level']}: cps expects 0 to 1")
    for width in ("prompt_width", "negative_prompt_width"):
        if width in values and values[width] < 1:
            raise RequestError(f"{width}={values[width]}: expected 1 or more text tokens")


def check_images(images: Sequence[InputImage], rules: Rules) -> None:
    least, most = rules.images
    if not least <= len(images) <= most:
        wanted = f"{least}" if least == most else f"{least} to {most}"
        raise RequestError(f"images: the prompt has {len(images)}, {rules.family} takes {wanted if most else 'none'}")


def check_text(text: str, rules: Rules) -> None:
    if not rules.empty_prompt and not text.strip():
        raise RequestError(f"the prompt is empty: {rules.family} needs a text; write a caption of the input image")


def check_sizes(values: Mapping[str, Any], multiple: int) -> None:
    for side in ("height", "width"):
        size = values[side]
        if size < multiple or size % multiple:
            near = max(multiple, round(size / multiple) * multiple)
            raise RequestError(f"{side}={size}: expected a multiple of {multiple} pixels; the nearest is {near}")


def _near(key: str, known: Sequence[str] | Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(key, list(known), n=1)
    return f"; did you mean {near[0]}?" if near else ""


def _stochastic_steps(step_indices: Sequence[int] | None, steps: int) -> tuple[int, ...]:
    chosen = tuple(range(steps - 1)) if step_indices is None else tuple(int(index) for index in step_indices)
    # The last step ends at sigma 0: with noise there, the image itself would be noisy, so it is always deterministic.
    if not chosen or chosen != tuple(range(chosen[0], chosen[0] + len(chosen))) or chosen[0] < 0 or chosen[-1] >= steps - 1:
        raise RequestError(
            f"step_indices={list(chosen)} of {steps} steps: expected neighbouring indices from 0 to {steps - 2} "
            "(the last step is deterministic); change sampling.sde_window_range or sde_window_size"
        )
    return chosen
