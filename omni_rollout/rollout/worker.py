"""What the trainer may ask of the engine's worker, by `collective_rpc`: take weights, and say which it has."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from vllm_omni.diffusion.worker.diffusion_worker import CustomPipelineWorkerExtension

from omni_rollout.digest import tensor_digest

PREFIX = "transformer."
FUSED = {  # fused projection -> the checkpoint's names, in the order of its rows
    ".to_qkv.": (".to_q.", ".to_k.", ".to_v."),
    ".add_kv_proj.": (".add_q_proj.", ".add_k_proj.", ".add_v_proj."),
}
RENAMED = {".to_out.": ".to_out.0."}


class RolloutWorkerExtension(CustomPipelineWorkerExtension):
    def load_policy(self, named: Iterable[tuple[str, torch.Tensor]], version: int) -> dict[str, str]:
        """Replaces the transformer's weights, then reads them back.

        Returns:
            The digest of every tensor as it now stands in the engine, by checkpoint name.
        """
        pipeline = self.model_runner.pipeline
        with torch.no_grad():
            pipeline.load_weights([(PREFIX + name, tensor) for name, tensor in named])
        pipeline.policy_version = version
        return self.policy_digests()

    def policy_digests(self) -> dict[str, str]:
        return {name: tensor_digest(tensor) for name, tensor in self._named_weights()}

    def _named_weights(self) -> Iterable[tuple[str, torch.Tensor]]:
        for name, parameter in self.model_runner.pipeline.transformer.named_parameters():
            for fused, parts in FUSED.items():
                if fused in name:
                    for part, rows in zip(parts, parameter.chunk(len(parts)), strict=True):
                        yield name.replace(fused, part), rows
                    break
            else:
                for engine_name, checkpoint_name in RENAMED.items():
                    name = name.replace(engine_name, checkpoint_name)
                yield name, parameter
