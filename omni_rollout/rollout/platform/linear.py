"""Linear layers that keep their weights, so that new ones can be loaded.

vLLM's CPU layers pack each weight for oneDNN after loading and leave an empty parameter behind: a second
`load_weights`, which is what RL does after every step, then fails. vLLM's hook for out-of-tree layers replaces them; vLLM asks
it on every platform, so `register_linears` makes products exact on a GPU as well. Packing is for CPUs only.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from vllm.model_executor.custom_op import op_registry_oot
from vllm.model_executor.layers import linear
from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

from omni_rollout.diffusion.machine import onednn_isa
from omni_rollout.diffusion.products import WIDE, PackedWeight, exact_linear

# vLLM asks the CPU for AMX, and not ONEDNN_MAX_CPU_ISA what it leaves of it: its bf16 kernel then ends the process.
WITHOUT_PACKED = ("SSE41", "AVX2", "AVX512_CORE")
SMALL = 2**28  # bytes of a network, at most, of which a second copy is kept for speed


class KeptWeightLinearMethod(linear.UnquantizedLinearMethod):
    """One of each layer's own."""

    def __init__(self) -> None:
        super().__init__()
        self.packed: PackedWeight | None = PackedWeight()

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Nothing to pack."""

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        with torch._C.DisableTorchFunctionSubclass():  # vLLM's parameters would send every look at one through Python
            parts = getattr(layer, "output_partition_sizes", None)  # q, k and v
            return exact_linear(x, layer.weight, bias, parts, self.packed)


class PackedLinearMethod(KeptWeightLinearMethod):
    """vLLM's packed GEMM beside the kept weight: faster, other roundings; to be packed again after every new weight."""

    def process_weights_after_loading(self, layer: Any) -> None:
        if onednn_isa() in WITHOUT_PACKED:
            layer.cpu_linear = F.linear
        else:
            dispatch_cpu_unquantized_gemm(layer, remove_weight=False)

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        # vLLM's bf16 kernel reads a strided input as if it were not: all rows but the first of a batch came out wrong.
        return layer.cpu_linear(x.contiguous(), layer.weight, bias)


def is_exact(layer: Any) -> bool:
    """Whether it multiplies by `exact_linear`."""
    return type(layer.quant_method) is KeptWeightLinearMethod


def forget_packed(module: torch.nn.Module) -> None:
    """After new weights, or when none is to lie about twice: exact layers below `module` pack theirs at the next product."""
    for layer in module.modules():
        method = getattr(layer, "quant_method", None)
        if isinstance(method, KeptWeightLinearMethod) and method.packed is not None:
            method.packed.forget()


def spare_packed(network: torch.nn.Module) -> None:
    """Of a network that is not small no wide layer keeps a packed weight; narrow ones are a small part of it."""
    if sum(parameter.nbytes for parameter in network.parameters()) <= SMALL:
        return
    layer: Any
    for layer in network.modules():
        method = getattr(layer, "quant_method", None)
        if isinstance(method, KeptWeightLinearMethod) and layer.weight.numel() >= WIDE:
            method.packed = None


def pack_linears(module: torch.nn.Module) -> None:
    """Packs the weights that the layers below `module` hold now."""
    layer: Any
    for layer in module.modules():
        if isinstance(getattr(layer, "quant_method", None), KeptWeightLinearMethod):
            layer.quant_method = PackedLinearMethod()
            layer.quant_method.process_weights_after_loading(layer)


class _KeptWeight:
    """Mixed in before a vLLM linear class: an unquantised layer gets the method above."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if type(self.quant_method) is linear.UnquantizedLinearMethod:
            self.quant_method = KeptWeightLinearMethod()


LINEAR_CLASSES = (
    linear.ReplicatedLinear,
    linear.ColumnParallelLinear,
    linear.RowParallelLinear,
    linear.QKVParallelLinear,
    linear.MergedColumnParallelLinear,
)


def register_linears() -> None:
    """Registers a weight-keeping variant of every linear class; the registry is the process's, so once is enough."""
    for base in LINEAR_CLASSES:
        if base.__name__ not in op_registry_oot:
            base.register_oot(type(f"KeptWeight{base.__name__}", (_KeptWeight, base), {}), name=base.__name__)
