"""The images are those of diffusers' own pipelines: same noise, same sigmas, deterministic, fp32, profile `reference`.

diffusers' pipelines are made of components loaded one by one and the project's processor, since loading them whole needs
torchvision. Their sizes are fixed (640 or 1024 pixels square); here the function that works them out is replaced.
"""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration

from omni_rollout.diffusion.machine import on_one_thread
from omni_rollout.models.base.image_sizes import size_of_area
from omni_rollout.models.base.images import made_image, open_image
from omni_rollout.models.base.qwen_processor import PILProcessor
from omni_rollout.models.base.sizes import DECODE_ROWS
from omni_rollout.types import InputImage, Prompt
from tests.parity.relatives import FAMILIES, Relative

MODULES = {
    "QwenImageLayeredPipeline": "pipeline_qwenimage_layered",
    "QwenImageEditPipeline": "pipeline_qwenimage_edit",
    "QwenImageEditPlusPipeline": "pipeline_qwenimage_edit_plus",
}
STEPS, SEED = 4, 11


def stock_pipeline(relative: Relative, transformer: Any = None) -> Any:
    path, name = relative.checkpoint, relative.spec.PIPELINE
    own = diffusers.QwenImageTransformer2DModel.from_pretrained(path, subfolder="transformer")
    pipeline = getattr(diffusers, name)(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(path, subfolder="scheduler"),
        vae=diffusers.AutoencoderKLQwenImage.from_pretrained(path, subfolder="vae"),
        text_encoder=Qwen2_5_VLForConditionalGeneration.from_pretrained(path, subfolder="text_encoder"),
        tokenizer=AutoTokenizer.from_pretrained(path, subfolder="tokenizer"),
        processor=PILProcessor.from_pretrained(path),
        transformer=own if transformer is None else transformer,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def decoded_in_batches(vae: Any, rows: int) -> None:
    """By as many as the project decodes at a time, and by one thread: the VAE's convolutions round by both numbers."""
    decode = vae.decode

    def in_batches(latents: torch.Tensor, **_: Any) -> tuple[torch.Tensor]:
        with on_one_thread():
            return (decode(latents.repeat(rows, 1, 1, 1, 1), return_dict=False)[0][: len(latents)],)

    vae.decode = in_batches


def ours(relative: Relative, images: tuple[InputImage, ...], **sampling: Any) -> np.ndarray:
    """Text exactly as wide as it is, as diffusers has it."""
    text, negative = "a photo of a cat", relative.spec.RULES.negative_prompt
    sized = relative.spec.resolve({**sampling, "prompt_width": 1}, images)
    tokenizer = AutoTokenizer.from_pretrained(relative.checkpoint, subfolder="tokenizer")
    widths = {
        "prompt_width": relative.spec.text_tokens(tokenizer, text, sized),
        "negative_prompt_width": relative.spec.text_tokens(tokenizer, negative, sized),
    }
    told = {**sampling, **widths, "sde_type": "ode", "num_inference_steps": STEPS}
    (trajectory,) = relative.generate([relative.request(0, images, SEED, **told)])
    assert trajectory.seed == SEED and trajectory.prompt.text == text
    return trajectory.media


def stock_sizes(module: Any, family: str, areas: dict[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    def dimensions(area: int, ratio: float) -> tuple[Any, ...]:
        shape = InputImage(path="", sha256="", height=10000, width=round(10000 * ratio))
        height, width = size_of_area(areas.get(area, 64 * 64), shape)
        return (width, height, None) if family == "qwen_image_edit" else (width, height)

    monkeypatch.setattr(module, "calculate_dimensions", dimensions)


def sampled(pipeline: Any, relative: Relative, images: tuple[InputImage, ...], guidance: float, **arguments: Any) -> np.ndarray:
    pictures = [open_image(image, "RGBA" if relative.family == "qwen_image_layered" else "RGB") for image in images]
    values = pipeline(
        image=pictures if len(pictures) > 1 else pictures[0],
        prompt="a photo of a cat",
        negative_prompt=relative.spec.RULES.negative_prompt if guidance > 1 else None,
        true_cfg_scale=guidance,
        num_inference_steps=STEPS,
        generator=torch.Generator().manual_seed(SEED),
        output_type="np",
        **arguments,
    ).images[0]
    return (np.asarray(values) * 255).round().astype(np.uint8)


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_image_is_that_of_diffusers(
    family: str, guidance: float, stock_sides: dict[str, Relative], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit with diffusers' forward in the project's products; by diffusers' own, values differ by rounding alone."""
    relative = stock_sides[family]
    sampling, images, arguments, areas = CASES[family]
    made = ours(relative, images, true_cfg_scale=guidance, **sampling)
    module = import_module(f"diffusers.pipelines.qwenimage.{MODULES[relative.spec.PIPELINE]}")

    stock_sizes(module, family, areas, monkeypatch)
    same_products = stock_pipeline(relative, relative.policy)
    decoded_in_batches(same_products.vae, DECODE_ROWS)
    exact, stock = (
        sampled(pipeline, relative, images, guidance, **arguments) for pipeline in (same_products, stock_pipeline(relative))
    )
    assert made.shape == exact.shape == stock.shape
    gap = np.abs(stock.astype(int) - made)
    print(
        f"\n{family}, guidance {guidance}: {(gap > 0).sum()} of {made.size} values differ from diffusers', by up to {gap.max()}"
    )
    assert np.array_equal(exact, made)
    assert gap.max() <= 1 and (gap > 0).mean() < 1e-3


# sampling here, input images, diffusers' own arguments, areas it asks for -> areas it gets (else 64 x 64)
CASES: dict[str, tuple[dict[str, Any], tuple[InputImage, ...], dict[str, Any], dict[int, int]]] = {
    "qwen_image_layered": ({"extra": {"layers": 2, "resolution": 64}}, (made_image(1, 64, 128),), {"layers": 2}, {}),
    "qwen_image_edit": ({"extra": {"vae_area": 64 * 64, "vision_area": 64 * 64}}, (made_image(1, 64, 128),), {}, {}),
    "qwen_image_edit_plus": (  # diffusers takes a size that is not given from the last image, vllm-omni from the first
        {"height": 64, "width": 96, "extra": {"vae_area": 64 * 64, "vision_area": 96 * 96}},
        tuple(made_image(number, 64, 64 + 32 * number) for number in range(3)),
        {"height": 64, "width": 96},
        {384 * 384: 96 * 96},
    ),
}


@pytest.fixture(scope="module")
def stock_sides(tmp_path_factory: pytest.TempPathFactory) -> Any:
    class Sides(dict[str, Relative]):
        """One engine at a time."""

        def __missing__(self, family: str) -> Relative:
            for relative in self.values():
                relative.engine.close()
            self.clear()
            self[family] = Relative(family, "float32", Path(tmp_path_factory.mktemp(family)), parity="reference")
            return self[family]

    sides = Sides()
    yield sides
    for relative in sides.values():
        relative.engine.close()


def test_pictures_encoded_in_another_order_are_seen_here_alone(
    stock_sides: dict[str, Relative], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The record then holds what the transformer was told, so its log-probs are the trainer's; the image is another."""
    family = "qwen_image_edit_plus"
    relative = stock_sides[family]
    sampling, images, *_ = CASES[family]
    pipeline = relative.engine.pipeline
    made = ours(relative, images, **sampling)
    with monkeypatch.context() as patch:
        patch.setattr(
            pipeline, "encode", lambda prompt, spec: type(pipeline).encode(pipeline, mirrored(prompt), mirrored(spec))
        )
        pipeline.encodings._kept.clear()
        mutant = ours(relative, images, **sampling)
        guided = relative.generate([relative.request(0, images, SEED, **sampling)])
        assert all(relative.equal(guided))
    pipeline.encodings._kept.clear()
    assert np.array_equal(ours(relative, images, **sampling), made) and not np.array_equal(mutant, made)


def mirrored(record: Any) -> Any:
    if isinstance(record, Prompt):
        return replace(record, images=record.images[::-1])
    sizes = {name: record.extra[name][::-1] for name in ("image_sizes", "vision_sizes")}
    return replace(record, extra={**record.extra, **sizes})
