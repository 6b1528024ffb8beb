"""The engine's worker and model runner on a CPU."""

from __future__ import annotations

from typing import Any

from vllm_omni.diffusion.attention.layer import Attention
from vllm_omni.diffusion.worker.diffusion_model_runner import DiffusionModelRunner
from vllm_omni.diffusion.worker.diffusion_worker import DiffusionWorker

from omni_rollout.rollout.platform.attention import CpuSDPAImpl


class CpuDiffusionWorker(DiffusionWorker):
    """Sleeping frees a GPU's memory through CUDA's allocator; on a CPU the weights simply stay."""

    def sleep(self, level: int = 1) -> int:
        return 0

    def wake_up(self, tags: list[str] | None = None) -> bool:
        return True


class CpuDiffusionModelRunner(DiffusionModelRunner):
    def load_model(self, *args: Any, **kwargs: Any) -> None:
        super().load_model(*args, **kwargs)
        if self.pipeline is None:
            return
        for layer in self.pipeline.modules():
            # fp32 inputs take the layer's fallback, an instance of the class that refuses unknown platforms.
            if isinstance(layer, Attention) and isinstance(layer.attention, CpuSDPAImpl):
                layer.sdpa_fallback = layer.attention
