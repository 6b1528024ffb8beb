"""`omni-rollout rollout` up to where torch is loaded: says what is going to be sampled."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from omni_rollout.config import SDETypeName, TrainConfig, Width
from omni_rollout.data.prompts import load_prompts
from omni_rollout.models import family_module

_SIZES = ("height", "width", "num_inference_steps", "true_cfg_scale")


def rollout(config: TrainConfig, out: Path, checkpoint: str | None = None, prepare: Callable[[Any], None] | None = None) -> int:
    """Samples every prompt of `config.prompts` into `out`; returns 0, or 1 when an image could not be made.

    Args:
        checkpoint: name of that whose weights `prepare` gives the engine.
    """
    from omni_rollout.launch.imports import imported_for_good
    from omni_rollout.launch.progress import progress_of

    prompts = load_prompts(config.prompts)
    print(rollout_line(config, len(prompts), out), file=sys.stderr)
    print(f"weights: {checkpoint or config.model.path}", file=sys.stderr)
    say_family_defaults(config)
    with progress_of(config.model.path, "loading torch and the engine") as progress:
        with imported_for_good():
            from omni_rollout.rollout.to_folder import rollout_to_folder

        made, failed = rollout_to_folder(config, prompts, out, progress, prepare)
    what, files = made_by(config)
    if made:
        capsules = "its capsule" if made == 1 else "their capsules"
        print(f"{many(made, what)} ({files}), {capsules} (*.safetensors), index.jsonl and grid.png: {out}")
    if failed:
        print(f"{failed} of {many(made + failed, what)} could not be made: see above", file=sys.stderr)
    return 1 if failed else 0


def made_by(config: TrainConfig) -> tuple[str, str]:
    """What this family makes, and the files it is saved in."""
    return ("video", "*.webp") if family_module(config.model.family, "spec").KIND == "video" else ("image", "*.png")


def rollout_line(config: TrainConfig, prompts: int, out: Path) -> str:
    """`3 prompts x 2 images: 64x64, 10 steps, no guidance, noise 0.7 (sde), 16 text tokens, float32; into rollouts`."""
    size = config.rollout.group_size
    return f"{many(prompts, 'prompt')} x {many(size, made_by(config)[0])}: {sampling_words(config)}; into {out}"


def sampling_words(config: TrainConfig) -> str:
    sizes = _sizes(config)
    guidance = f"guidance {sizes['true_cfg_scale']:g}" if sizes["true_cfg_scale"] > 1 else "no guidance"
    given = config.collate.prompt_width
    tokens = family_module(config.model.family, "spec").DEFAULTS["prompt_width"] if given is None else given
    width = f"{tokens} text tokens" if config.collate.width is Width.fixed else f"at most {tokens} text tokens"
    steps = f"{sizes['num_inference_steps']} steps"
    size = f"{sizes['height']}x{sizes['width']}" if sizes["height"] and sizes["width"] else "sizes of the input images"
    kind, level = config.sampling.sde_type, config.sampling.noise_level
    noise = "no noise (ode)" if kind is SDETypeName.ode else f"noise {level:g} ({kind.value})"
    return f"{size}, {steps}, {guidance}, {noise}, {width}, {config.model.dtype.value}"


def say_family_defaults(config: TrainConfig) -> None:
    """Where a checkpoint was given by its path alone: what nobody chose, and how to choose it."""
    unset = [key for key in _SIZES if getattr(config.sampling, key) is None and _sizes(config)[key] is not None]
    if unset:
        chosen = " ".join(f"sampling.{key}={_sizes(config)[key]:g}" for key in unset)
        print(
            f"{config.model.path} does not say how it is sampled, so as {config.model.family} was published: {chosen}; "
            "give others, or a model's in configs/model, such as model=nano model.path=...",
            file=sys.stderr,
        )


def _sizes(config: TrainConfig) -> Mapping[str, Any]:
    defaults = family_module(config.model.family, "spec").DEFAULTS
    given = {key: getattr(config.sampling, key) for key in _SIZES}
    return {key: defaults[key] if value is None else value for key, value in given.items()}


def many(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
