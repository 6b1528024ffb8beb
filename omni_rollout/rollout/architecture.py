"""A family's pipeline under a name of our own in vllm-omni's registry: so no stock function before or after it is looked up."""

from __future__ import annotations

from vllm_omni.diffusion.registry import register_diffusion_model

from omni_rollout.models import family_module


def register(family: str) -> str:
    """Returns the name, for `model_class_name`."""
    module, _, pipeline = family_module(family, "spec").ROLLOUT_PIPELINE.rpartition(".")
    name = f"OmniRollout{pipeline}"
    register_diffusion_model(name, module, pipeline)
    return name
