"""README.md of an exported checkpoint: how to load it, how it was trained, and the sha256 of every file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path, PurePath

from omni_rollout.config import TrainConfig
from omni_rollout.models import family_module
from omni_rollout.policy.state import file_digest
from omni_rollout.run.source import Source

CARD = "README.md"
FILES = ("model.path", "prompts", "evaluation.prompts")  # settings that are paths of the machine it was trained on


def write_card(config: TrainConfig, source: Source, to: str, out: Path) -> None:
    (out / CARD).write_text("\n".join(_lines(config, source, to, out)) + "\n", encoding="utf-8")


def _lines(config: TrainConfig, source: Source, to: str, out: Path) -> Iterator[str]:
    run, base = source.run, _shown("model.path", config.model.path)
    local = Path(config.model.path).is_dir()  # its name says nothing elsewhere, and would be looked up as a hub's
    rewards = [f"{key.removeprefix('reward.weights.')} ({value:g})" for key, value in run.config.items() if "reward.w" in key]
    algorithm, kind = run.config.get("algorithm.name"), "LoRA" if source.kind == "lora" else "full weights"
    yield from ("---", *([] if local else [f"base_model: {base}"]), "library_name: diffusers", "tags:", "- omni_rollout")
    yield from (
        f"- {algorithm}",
        *(["- lora"] if to == "lora" else []),
        "---",
        "",
        f"# {base}, trained for {', '.join(rewards)}",
        "",
    )
    which = f"{kind}, average of the weights" if source.averaged else kind
    yield f"Step {run.step} of a {algorithm} run of omni_rollout ({which})."
    yield f"What is here: {to}, {config.model.dtype.value}."
    if local:
        told = "a run keeps no digest of what it started from, so no base_model is named above"
        yield f"The base model was a folder named {PurePath(base).name}, of family {config.model.family}; {told}."
    yield from (
        "",
        "## Loading",
        "",
        "```python",
        *_loading(config, to, "PATH OF THE BASE MODEL" if local else base, out),
        "```",
        "",
    )
    if metrics := _metrics(source):
        yield from ("## After this step", "", "| metric | value |", "|---|---|")
        yield from (*(f"| {name} | {value:.4f} |" for name, value in metrics.items()), "")
    yield from ("## Training", "", "| setting | value |", "|---|---|")
    yield from (f"| {key} | {_shown(key, value)} |" for key, value in sorted(run.config.items()))
    yield from (f"| sha256 of the prompts | {run.prompts} |", f"| digest of the policy's weights | {run.weights} |")
    yield from ("", "## Files", "", "| file | sha256 |", "|---|---|")
    files = sorted(path for path in out.rglob("*") if path.is_file() and path.name != CARD)
    yield from (f"| {path.relative_to(out)} | {file_digest(path)} |" for path in files)


def _loading(config: TrainConfig, to: str, base: str, out: Path) -> Iterator[str]:
    pipeline = family_module(config.model.family, "spec").PIPELINE
    yield from ("import diffusers", "import torch", "")
    dtype = f"torch_dtype=torch.{config.model.dtype.value}"
    if to == "pipeline":
        yield f'pipeline = diffusers.{pipeline}.from_pretrained("PATH OF THIS FOLDER", {dtype})'
        return
    if to == "lora":
        yield f'pipeline = diffusers.{pipeline}.from_pretrained("{base}", {dtype})'
        for folder in sorted(path.parent for path in out.rglob("*.safetensors")):
            place = "" if folder == out else f"/{folder.name}"
            second = ", load_into_transformer_2=True" if folder.name.endswith("_2") else ""
            yield f'pipeline.load_lora_weights("PATH OF THIS FOLDER{place}"{second})'
        return
    for folder in sorted(path.parent for path in out.rglob("config.json")):
        name = json.loads((folder / "config.json").read_text(encoding="utf-8"))["_class_name"]
        yield f'{folder.name} = diffusers.{name}.from_pretrained("PATH OF THIS FOLDER", subfolder="{folder.name}", {dtype})'
    parts = ", ".join(f"{folder.name}={folder.name}" for folder in sorted(out.glob("transformer*")))
    yield f'pipeline = diffusers.{pipeline}.from_pretrained("{base}", {parts}, {dtype})'


def _metrics(source: Source) -> dict[str, float]:
    """What the run measured after this step, where it lies beside its run's metrics."""
    path = source.folder.absolute().parents[1] / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    found = [line for text in lines if (line := json.loads(text))["step"] == source.run.step]
    wanted = ("evaluation/", "critic/rewards/mean", "parity/ppo_kl_mb0", "parity/bitwise_equal_fraction")
    return {key: value for line in found for key, value in line.items() if key.startswith(wanted) and value is not None}


def _shown(key: str, value: object) -> str:
    """A card is read elsewhere: of a path on this machine only its end is told."""
    text = str(value)
    return PurePath(text).name if key in FILES and PurePath(text).is_absolute() else text
