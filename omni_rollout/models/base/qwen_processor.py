"""Qwen2-VL's processor of text and images without torchvision.

transformers' own `Qwen2VLProcessor` holds a processor of videos that needs torchvision, which has no CPU wheel beside the torch
that vLLM pins: it alone would keep every pipeline of Qwen-Image with input images from starting. What those ask of it is
little: scale and cut images by PIL, and write as many image tokens into the text as each fills. That is here, and it is used
on a GPU as well, so that both see the same pixels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from functools import cache
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

from huggingface_hub import try_to_load_from_cache

from omni_rollout.errors import PinnedKnobError
from omni_rollout.models.base.causes import swapped
from omni_rollout.types import RequestError

WRITTEN_FOR = {"transformers": "5.10.", "vllm-omni": "0.28."}  # beginnings of the versions whose insides it stands in for
IMAGE_TOKEN = "<|image_pad|>"
FOLDER, CONFIG = "processor", "preprocessor_config.json"


class PILProcessor:
    """What vllm-omni's and diffusers' pipelines call as `processor`."""

    def __init__(self, image_processor: Any, tokenizer: Any) -> None:
        self.image_processor, self.tokenizer = image_processor, tokenizer

    @classmethod
    def from_pretrained(cls, path: str, subfolder: str = FOLDER, **options: Any) -> PILProcessor:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(path, subfolder=subfolder, **options)
        return cls(_image_processor_class().from_pretrained(path, subfolder=subfolder, **options), tokenizer)

    def __call__(self, text: str | Sequence[str], images: Any, return_tensors: str = "pt", **options: Any) -> Any:
        """`input_ids`, `attention_mask`, `pixel_values`, `image_grid_thw`; images in the order of their tokens in `text`.

        No `mm_token_type_ids`: the pipelines pass none on, so that image tokens have text's positions. That is the model.
        """
        from transformers import BatchFeature

        features = self.image_processor(images=images, return_tensors=return_tensors)
        counts = iter((features["image_grid_thw"].prod(dim=1) // self.image_processor.merge_size**2).tolist())
        texts = [text] if isinstance(text, str) else text
        tokens = self.tokenizer([_filled(one, counts) for one in texts], return_tensors=return_tensors, **options)
        return BatchFeature({**tokens, **features})


def _filled(text: str, counts: Iterator[int]) -> str:
    head, *rest = text.split(IMAGE_TOKEN)
    return head + "".join(IMAGE_TOKEN * next(counts) + part for part in rest)


def _image_processor_class() -> Any:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    return Qwen2VLImageProcessorPil


def pil_processor(pipeline: ModuleType) -> AbstractContextManager[None]:
    """Inside, the pipelines of this module of vllm-omni make a `PILProcessor` where they would make a `Qwen2VLProcessor`.

    Raises:
        PinnedKnobError: another version than it was written for.
    """
    for package, beginning in WRITTEN_FOR.items():
        if not version(package).startswith(beginning):
            raise PinnedKnobError(
                f"{package} is {version(package)}: the processor without torchvision was written for {beginning}x; "
                "install that, or look whether it still stands in for Qwen2VLProcessor and raise WRITTEN_FOR"
            )
    if not hasattr(pipeline, "Qwen2VLProcessor"):
        raise PinnedKnobError(f"{pipeline.__name__} has no Qwen2VLProcessor to stand in for")
    return swapped(pipeline, "Qwen2VLProcessor", PILProcessor)


def image_tokens(checkpoint: str, height: int, width: int) -> int:
    """How many tokens of the text one image fills, by arithmetic.

    Args:
        checkpoint: folder or hub id, whose `processor/preprocessor_config.json` bounds the number of pixels.

    Raises:
        RequestError: no such file, or an image of an aspect ratio that the processor refuses.
    """
    processor = _image_processor(checkpoint)
    try:
        return processor.get_number_of_image_patches(height, width, {}) // processor.merge_size**2
    except ValueError as error:
        raise RequestError(f"image of {width}x{height} pixels: {error}") from error


@cache
def _image_processor(checkpoint: str) -> Any:
    if Path(checkpoint).is_dir():
        file: Any = Path(checkpoint) / FOLDER / CONFIG
    else:
        file = try_to_load_from_cache(checkpoint, f"{FOLDER}/{CONFIG}")
    if not isinstance(file, str | Path) or not Path(file).is_file():
        raise RequestError(
            f"{checkpoint}: no {FOLDER}/{CONFIG}, so nobody can tell how many text tokens an image fills; was it copied whole?"
        )
    return _image_processor_class().from_json_file(str(file))
