"""What the trainer may ask of the engine's worker, by `collective_rpc`: take weights, and say which it has."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from vllm.model_executor.layers.linear import LinearBase
from vllm_omni.diffusion.attention.layer import Attention
from vllm_omni.diffusion.worker.diffusion_worker import CustomPipelineWorkerExtension

from omni_rollout.diffusion.host import let_helpers_go
from omni_rollout.diffusion.machine import machine, pin_thread
from omni_rollout.diffusion.one_thread import one_thread_suffices
from omni_rollout.diffusion.self_check import Layer, attention_shape, find_fused, linear_layers, self_check
from omni_rollout.models import family_module
from omni_rollout.rollout.platform.attention import install_attention
from omni_rollout.rollout.platform.linear import forget_packed, is_exact, pack_linears, spare_packed
from omni_rollout.rollout.platform.native import all_native, use_native
from omni_rollout.trajectories.digest import same_memory, tensor_digests


class RolloutWorkerExtension(CustomPipelineWorkerExtension):
    model_runner: Any  # of the worker that the engine mixes this class into

    def re_init_pipeline(self, custom_pipeline_args: dict[str, Any]) -> None:
        super().re_init_pipeline(custom_pipeline_args)
        if custom_pipeline_args["parity"] == "exact":
            for network in self.model_runner.pipeline.experts.values():
                use_native(network)
                install_attention(network)
                spare_packed(network)
        self._given_back: dict[str, tuple[torch.UntypedStorage, int]] = {}  # by checkpoint name; its size when it has memory
        self._pack = custom_pipeline_args["parity"] == "fast" and not torch.cuda.is_available()
        self._repack()

    def _repack(self) -> None:
        if self._pack:
            for network in self.model_runner.pipeline.experts.values():
                pack_linears(network)

    def _forget_packed(self) -> None:
        for network in self.model_runner.pipeline.experts.values():
            forget_packed(network)

    def pinned_knobs(self) -> dict[str, Any]:
        """What the exact profile pins, as it really is in this worker."""
        config, pipeline = self.model_runner.od_config, self.model_runner.pipeline
        parallel = config.parallel_config
        layers = [layer for layer in pipeline.modules() if isinstance(layer, Attention)]
        return {
            "attention": sorted({type(impl).__name__ for m in layers for impl in (m.attention, m.sdpa_fallback)}),
            "linear": all(
                is_exact(m) for network in pipeline.experts.values() for m in network.modules() if isinstance(m, LinearBase)
            ),
            "compiled": not config.enforce_eager,
            "cache_backend": config.cache_backend or "none",
            "quantization": config.quantization_config,
            "native": all(map(all_native, pipeline.experts.values())),
            "parallel": (parallel.tensor_parallel_size, parallel.sequence_parallel_size, parallel.cfg_parallel_size),
        }

    def check_machine(self, exact: bool) -> dict[str, Any]:
        """This machine as the engine's thread sees it; with `exact`, after the self-check of the loaded transformer."""
        pipeline, config = self.model_runner.pipeline, self.model_runner.od_config
        if not exact:
            return machine(pipeline.device)
        pin_thread(pipeline.threads)
        transformer = next(iter(pipeline.experts.values()))  # experts are of one shape
        attention = next((layer for layer in transformer.modules() if isinstance(layer, Attention)), None)
        heads, head_dim = attention_shape(transformer) if attention is None else (attention.num_heads, attention.head_size)
        where: Any = {"dtype": config.dtype, "device": pipeline.device}
        layers, fused = list(_linear_layers(transformer)), _fused_layers(transformer)
        checked = self_check(layers, heads=heads, head_dim=head_dim, **where)
        for parts, in_features in fused:
            find_fused(parts, in_features, **where)
        pipeline.faster_threads.suffices = one_thread_suffices(layers, fused, heads=heads, head_dim=head_dim, **where)
        return checked

    def let_helpers_go(self) -> None:
        """As nothing is sampled any more: what follows, such as an update, is another thread's."""
        let_helpers_go()

    def load_weights(self, named: Sequence[tuple[str, torch.Tensor]]) -> list[tuple[str, torch.Tensor]]:
        """Replaces some of the policy's weights.

        Args:
            named: by checkpoint name; of a policy of several experts, below the name of each one's folder.

        Returns:
            Those that were copied; the others are the engine's own memory already.
        """
        self._refill(name for name, _ in named)
        pipeline, own = self.model_runner.pipeline, self.policy_tensors()
        moved = [(name, tensor) for name, tensor in named if not same_memory(tensor, own.get(name))]
        with torch.no_grad():
            prefix = "transformer." if len(pipeline.experts) == 1 else ""
            pipeline.load_weights([(prefix + name, tensor) for name, tensor in moved])
        return moved

    def adopt_policy(self, version: int) -> dict[str, str]:
        """The weights that were loaded are the policy's `version` from now on.

        Returns:
            The digest of every tensor as it now stands in the engine, by checkpoint name.
        """
        self._refill(list(self._given_back))  # what was not sent has memory, and no bits that anybody knows
        self.model_runner.pipeline.policy_version = version
        self._forget_packed()
        self._repack()
        digests = self.policy_digests()
        let_helpers_go()
        return digests

    def give_back(self, keep: Collection[str]) -> None:
        """Frees the policy's weights, but for those that share memory with one of `keep`, until they are loaded again."""
        storages = {name: tensor.untyped_storage() for name, tensor in self._named_weights()}
        kept = {storages[name].data_ptr() for name in keep}
        freed = {name: storage for name, storage in storages.items() if storage.nbytes() and storage.data_ptr() not in kept}
        self._given_back |= {name: (storage, storage.nbytes()) for name, storage in freed.items()}
        for storage in freed.values():
            storage.resize_(0)
        self._forget_packed()

    def _refill(self, names: Iterable[str]) -> None:
        for name in names:
            storage, size = self._given_back.pop(name, (None, 0))
            if storage is not None and not storage.nbytes():
                storage.resize_(size)

    def beside_policy(self) -> list[torch.Tensor]:
        """What the pipeline holds beside the policy: parameters and buffers of text encoder and VAE."""
        pipeline = self.model_runner.pipeline
        own = {id(tensor) for network in pipeline.experts.values() for tensor in _tensors(network)}
        return [tensor for tensor in _tensors(pipeline) if id(tensor) not in own]

    def policy_digests(self) -> dict[str, str]:
        return tensor_digests(self._named_weights())

    def policy_tensors(self) -> dict[str, torch.Tensor]:
        """The engine's own, by checkpoint name: parts of fused ones are views of it."""
        return {name: tensor.detach() for name, tensor in self._named_weights()}

    def policy_layout(self) -> dict[str, tuple[str, list[int]]]:
        """dtype and shape of every tensor, by checkpoint name."""
        return {name: (str(tensor.dtype).removeprefix("torch."), list(tensor.shape)) for name, tensor in self._named_weights()}

    def _named_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Of those that have memory."""
        pipeline = self.model_runner.pipeline
        table = family_module(pipeline.family, "weights")
        for folder, network in pipeline.experts.items():
            prefix = "" if len(pipeline.experts) == 1 else f"{folder}."
            for name, parameter in network.named_parameters():
                if parameter.numel() and not parameter.untyped_storage().nbytes():
                    continue
                for own, tensor in checkpoint_names(name, parameter, table.FUSED, table.RENAMED):
                    yield prefix + own, tensor


def _tensors(module: torch.nn.Module) -> Iterator[torch.Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def _linear_layers(transformer: torch.nn.Module) -> Iterator[Layer]:
    """Every product of the engine's transformer; the parts of a fused one by themselves."""
    yield from linear_layers(transformer)
    for name, layer in transformer.named_modules():
        if isinstance(layer, LinearBase):
            dense: Any = layer
            for features in getattr(dense, "output_partition_sizes", None) or [dense.output_size]:
                yield Layer(name, features, dense.input_size)


def _fused_layers(transformer: torch.nn.Module) -> set[tuple[tuple[int, ...], int]]:
    """(output features of the parts, input features) of each kind."""
    layers: list[Any] = [layer for layer in transformer.modules() if hasattr(layer, "output_partition_sizes")]
    kinds = {(tuple(layer.output_partition_sizes), layer.input_size) for layer in layers}
    return {(parts, features) for parts, features in kinds if len(parts) > 1}


def checkpoint_names(
    name: str, parameter: torch.Tensor, fused: Mapping[str, Sequence[str]], renamed: Mapping[str, str]
) -> Iterator[tuple[str, torch.Tensor]]:
    """A parameter of the engine under the names it has in the checkpoint; a fused one in its parts."""
    for whole, parts in fused.items():
        if whole in name:
            yield from (
                (name.replace(whole, part), rows) for part, rows in zip(parts, parameter.chunk(len(parts)), strict=True)
            )
            return
    for engine_name, checkpoint_name in renamed.items():
        name = name.replace(engine_name, checkpoint_name)
    yield name, parameter
