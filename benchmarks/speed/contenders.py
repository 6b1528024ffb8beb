"""Who is measured. Each is loaded with a shape and then makes the images of a round, from prompts to pixels.

`floor` makes none: it is the bare diffusers transformer, called as often as the images need it and on as many tokens.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from typing import Any

from benchmarks.speed.shapes import GROUP, NEGATIVE, Shape, prompts, seed

WAIT_MS = 10  # for more requests of a batch, in request mode


class Contender(ABC):
    """In a process of its own. Loaded as it is made."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape

    @abstractmethod
    def round(self, number: int) -> None:
        """Makes all images of a round."""

    def close(self) -> None:  # noqa: B027
        """Frees what must be freed before the process ends: an engine's thread."""


class Diffusers(Contender):
    """The stock pipeline; a batch at a time."""

    def __init__(self, shape: Shape, batch: int) -> None:
        import torch
        from diffusers import QwenImagePipeline

        super().__init__(shape)
        self._batch = batch
        pipeline: Any = QwenImagePipeline.from_pretrained(shape.path, torch_dtype=getattr(torch, shape.dtype))
        pipeline.set_progress_bar_config(disable=True)
        self._pipeline = pipeline

    def round(self, number: int) -> None:
        import torch

        shape, texts = self.shape, prompts(self.shape, number)
        for start in range(0, shape.images, self._batch):
            batch = texts[start : start + self._batch]
            images = self._pipeline(
                prompt=batch,
                negative_prompt=[NEGATIVE] * len(batch) if shape.guided else None,
                height=shape.pixels,
                width=shape.pixels,
                num_inference_steps=shape.steps,
                true_cfg_scale=shape.true_cfg_scale,
                generator=[torch.Generator().manual_seed(seed(number, start + row)) for row in range(len(batch))],
            ).images
            assert len(images) == len(batch)


class Floor(Contender):
    """Nothing but the transformer, at the batch, the tokens and the text width that ours has."""

    def __init__(self, shape: Shape) -> None:
        import torch

        super().__init__(shape)
        self._transformer = transformer(shape)
        self._inputs = transformer_inputs(shape, shape.in_flight, getattr(torch, shape.dtype))

    def round(self, number: int) -> None:
        import torch

        shape = self.shape
        with torch.inference_mode():
            for _ in range(shape.images // shape.in_flight * shape.steps * (2 if shape.guided else 1)):
                self._transformer(**self._inputs)


def transformer(shape: Shape, dtype: str | None = None) -> Any:
    """The stock class, as diffusers loads it; `dtype` None: the shape's."""
    import torch
    from diffusers import QwenImageTransformer2DModel

    return QwenImageTransformer2DModel.from_pretrained(
        shape.path, subfolder="transformer", torch_dtype=getattr(torch, dtype or shape.dtype)
    )


def transformer_inputs(shape: Shape, rows: int, dtype: Any) -> dict[str, Any]:
    """Of one forward pass over `rows` images; text is not padded, so there is no mask."""
    import json
    from pathlib import Path

    import torch

    config = json.loads((Path(shape.path) / "transformer" / "config.json").read_text(encoding="utf-8"))
    generator, side = torch.Generator().manual_seed(0), shape.pixels // 16
    text = torch.randn(rows, shape.prompt_width, config["joint_attention_dim"], generator=generator)
    return {
        "hidden_states": torch.randn(rows, shape.tokens, config["in_channels"], generator=generator).to(dtype),
        "encoder_hidden_states": text.to(dtype),
        "timestep": torch.full((rows,), 0.5, dtype=dtype),
        "img_shapes": [[(1, side, side)]] * rows,
        "return_dict": False,
    }


class Stock(Contender):
    """vllm-omni's own pipeline, by steps or by whole requests, with vLLM's packed products.

    On a CPU it needs a platform plug-in to run at all, which is ours.
    """

    def __init__(self, shape: Shape, *, by_steps: bool) -> None:
        from vllm_omni.diffusion.data import OmniDiffusionConfig
        from vllm_omni.diffusion.diffusion_engine import DiffusionEngine

        from omni_rollout.rollout.platform.linear import pack_linears

        super().__init__(shape)
        config = OmniDiffusionConfig(
            model=shape.path,
            dtype=shape.dtype,  # type: ignore[arg-type]
            distributed_executor_backend="uni",
            step_execution=by_steps,
            max_num_seqs=shape.in_flight,
            request_batch_max_wait_ms=0 if by_steps else WAIT_MS,
            enable_prompt_embed_cache=True,
        )
        config.enrich_config()
        config.master_port = 0
        self._engine = DiffusionEngine.make_engine(config)
        executor: Any = self._engine.executor
        pack_linears(executor.driver_worker.worker.model_runner.pipeline.transformer)
        self._loop = asyncio.new_event_loop()

    def round(self, number: int) -> None:
        self._loop.run_until_complete(self._all(number))

    async def _all(self, number: int) -> None:
        await asyncio.gather(*(self._one(number, index, text) for index, text in enumerate(prompts(self.shape, number))))

    async def _one(self, number: int, index: int, text: str) -> None:
        from vllm_omni.diffusion.request import OmniDiffusionRequest
        from vllm_omni.inputs.data import OmniDiffusionSamplingParams

        shape = self.shape
        asked = OmniDiffusionRequest(
            prompt={"prompt": text, **({"negative_prompt": NEGATIVE} if shape.guided else {})},
            request_id=f"{number}-{index}",
            sampling_params=OmniDiffusionSamplingParams(
                height=shape.pixels,
                width=shape.pixels,
                num_inference_steps=shape.steps,
                true_cfg_scale=shape.true_cfg_scale,
                seed=seed(number, index),
                generator_device="cpu",
            ),
        )
        streamed = [outputs async for outputs in self._engine.step_streaming(asked)]
        assert len(streamed[-1][0].images) == 1

    def close(self) -> None:
        self._engine.close()
        self._loop.close()


class Ours(Contender):
    def __init__(self, shape: Shape, parity: str) -> None:
        from omni_rollout.launch.imports import imported_for_good

        with imported_for_good():  # as every command does
            from omni_rollout.rollout.engine import RolloutEngine

        super().__init__(shape)
        self.engine = RolloutEngine(shape.path, dtype=shape.dtype, max_num_seqs=shape.in_flight, parity=parity)

    def round(self, number: int) -> None:
        assert sum(1 for _ in self.engine.generate(requests(self.shape, number))) == self.shape.images

    def close(self) -> None:
        self.engine.close()


def requests(shape: Shape, number: int) -> list[Any]:
    """Of a round, for `RolloutEngine.generate`."""
    from omni_rollout.models.qwen_image.spec import resolve
    from omni_rollout.types import Prompt, RolloutRequest

    sizes = {"height": shape.pixels, "width": shape.pixels, "num_inference_steps": shape.steps}
    widths = {"prompt_width": shape.prompt_width, "negative_prompt_width": shape.prompt_width}
    spec = resolve({**sizes, **widths, "true_cfg_scale": shape.true_cfg_scale})
    return [
        RolloutRequest(
            request_id=f"{number}-{index}",
            prompt=Prompt(text=text),
            spec=spec,
            seed=seed(number, index),
            group_id=f"{number}-{index // GROUP}",
            member=index % GROUP,
        )
        for index, text in enumerate(prompts(shape, number))
    ]


SERIAL, BATCHED, FLOOR, EXACT, FAST = "diffusers, one by one", "diffusers, batched", "floor", "ours, exact", "ours, fast"
STEPWISE, BY_REQUEST = "vllm-omni, by steps", "vllm-omni, by requests"


def make(name: str, shape: Shape) -> Contender:
    if name in (SERIAL, BATCHED):
        return Diffusers(shape, 1 if name == SERIAL else shape.in_flight)
    if name in (STEPWISE, BY_REQUEST):
        return Stock(shape, by_steps=name == STEPWISE)
    return Floor(shape) if name == FLOOR else Ours(shape, "exact" if name == EXACT else "fast")


NAMES = (SERIAL, BATCHED, STEPWISE, BY_REQUEST, FLOOR, EXACT, FAST)
