"""Writes a checkpoint that has a processor of images beside its tokenizer, folder by folder.

diffusers' pipelines of it cannot be made without torchvision, which `Qwen2VLProcessor` needs even where it is only saved.
"""

import json
from pathlib import Path
from typing import Any

import diffusers

from omni_rollout.models.base.qwen_processor import CONFIG, FOLDER

# As Qwen2-VL publishes it, with the bounds on pixels that its class has for defaults.
PREPROCESSOR = {
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "image_processor_type": "Qwen2VLImageProcessor",
    "processor_class": "Qwen2VLProcessor",
    "merge_size": 2,
    "patch_size": 14,
    "temporal_patch_size": 2,
    "resample": 3,
    "rescale_factor": 1 / 255,
    "size": {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280},
}


def save(out: Path, pipeline: str, parts: dict[str, Any]) -> None:
    """`parts`: components by name; a processor is made of the tokenizer."""
    index: dict[str, Any] = {"_class_name": pipeline, "_diffusers_version": diffusers.__version__}
    for name, part in parts.items():
        part.save_pretrained(out / name)
        index[name] = [type(part).__module__.partition(".")[0], type(part).__name__]
    parts["tokenizer"].save_pretrained(out / FOLDER)
    _write(out / FOLDER / CONFIG, PREPROCESSOR)
    _write(out / FOLDER / "config.json", {"model_type": "qwen2_vl"})
    index[FOLDER] = ["transformers", "Qwen2VLProcessor"]
    _write(out / "model_index.json", dict(sorted(index.items())))


def _write(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
