"""The CPU as a vllm-omni platform: every hook through which the engine asks what the machine can do."""

from __future__ import annotations

import resource
from typing import Any

import psutil
import torch
from vllm.platforms.cpu import CpuPlatform
from vllm_omni.platforms.interface import OmniPlatform, OmniPlatformEnum

_HOME = "omni_rollout.rollout.platform"


class CpuOmniPlatform(OmniPlatform, CpuPlatform):
    _omni_enum = OmniPlatformEnum.OOT
    device_type = "cpu"
    device_name = "cpu"
    dist_backend = "gloo"

    @classmethod
    def get_diffusion_attn_backend_cls(cls, selected_backend: str | None, head_size: int, **_: Any) -> str:
        if selected_backend is not None and selected_backend.upper() != "TORCH_SDPA":
            raise ValueError(f"attention backend {selected_backend!r}: a CPU offers TORCH_SDPA only")
        return f"{_HOME}.attention.CpuSDPABackend"

    @classmethod
    def get_diffusion_worker_cls(cls) -> str:
        return f"{_HOME}.worker.CpuDiffusionWorker"

    @classmethod
    def get_diffusion_model_runner_cls(cls) -> str:
        return f"{_HOME}.worker.CpuDiffusionModelRunner"

    @classmethod
    def init_diffusion_worker_vllm_config(cls, vllm_config: Any) -> None:
        from omni_rollout.rollout.platform.linear import register_linears

        register_linears()

    @classmethod
    def supports_torch_inductor(cls) -> bool:
        return False

    @classmethod
    def supports_cpu_offload(cls) -> bool:
        return False

    @classmethod
    def get_torch_device(cls, local_rank: int | None = None) -> torch.device:
        return torch.device("cpu")

    @classmethod
    def get_device_count(cls) -> int:
        return 1

    @classmethod
    def set_device(cls, device: torch.device) -> None:
        """One CPU: nothing to select."""

    @classmethod
    def current_device(cls) -> int:
        return 0

    @classmethod
    def is_initialized(cls) -> bool:
        return True

    @classmethod
    def is_available(cls) -> bool:
        return False  # the engine asks this before it uses streams, caches and peak-memory counters

    @classmethod
    def get_device_version(cls) -> str | None:
        return None

    @classmethod
    def synchronize(cls) -> None:
        """CPU work is synchronous."""

    # torch.cpu lacks the memory calls below, and the base class answers None for what is lacking: defined here, all.
    @classmethod
    def empty_cache(cls) -> None:
        """No caching allocator."""

    @classmethod
    def reset_peak_memory_stats(cls, device: Any = None) -> None:
        """The kernel keeps the peak of the process's life."""

    @classmethod
    def max_memory_reserved(cls, device: Any = None) -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    max_memory_allocated = max_memory_reserved

    @classmethod
    def get_free_memory(cls, device: Any = None) -> int:
        return psutil.virtual_memory().available

    @classmethod
    def get_device_memory(cls, device: Any = None) -> tuple[int, int]:
        memory = psutil.virtual_memory()
        return memory.available, memory.total

    @classmethod
    def get_device_total_memory(cls, device_id: int = 0) -> int:
        return psutil.virtual_memory().total

    @classmethod
    def get_default_stage_config_path(cls) -> str:
        return "vllm_omni/deploy"
