"""vllm-omni platform plug-in: lets the unmodified engine run without a GPU. On a CUDA machine it stands aside."""

from __future__ import annotations


def platform() -> str | None:
    """Entry point of the group `vllm_omni.platform_plugins`: the platform's class path, or None to stand aside."""
    import torch

    return None if torch.cuda.is_available() else "omni_rollout.rollout.platform.cpu.CpuOmniPlatform"
