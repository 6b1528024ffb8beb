"""How vllm-omni's engine is set up: a family's pipeline step by step, nothing cached, nothing quantised."""

from __future__ import annotations

from typing import Any

from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.diffusion.registry import register_diffusion_model

from omni_rollout.models import family_module


def engine_config(path: str, family: str, dtype: str, max_num_seqs: int, parity: str, threads: int) -> OmniDiffusionConfig:
    """Of an engine in this process; the arguments are `RolloutEngine`'s."""
    pipeline = family_module(family, "spec").ROLLOUT_PIPELINE
    settings: dict[str, Any] = {
        "model": path,
        "model_class_name": _register(family),
        "dtype": dtype,
        "enforce_eager": parity != "fast",
        "distributed_executor_backend": "uni",
        "step_execution": True,
        "max_num_seqs": max_num_seqs,
        "cache_backend": "none",
        "enable_prompt_embed_cache": True,
        "custom_pipeline_args": {"pipeline_class": pipeline, "parity": parity, "threads": threads},
        "diffusion_attention_config": None if parity == "fast" else {"default": {"backend": "TORCH_SDPA"}},
        "worker_extension_cls": "omni_rollout.rollout.worker.RolloutWorkerExtension",
    }
    config = OmniDiffusionConfig(**settings)
    config.enrich_config()
    return config


def _register(family: str) -> str:
    """A family's pipeline under a name of our own, so no stock function before or after it is looked up. Returns the name."""
    module, _, pipeline = family_module(family, "spec").ROLLOUT_PIPELINE.rpartition(".")
    name = f"OmniRollout{pipeline}"
    register_diffusion_model(name, module, pipeline)
    return name
