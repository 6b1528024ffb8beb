"""LoRA whose forward computes with the merged weight, so that what a step differentiates is what the engine runs.

PEFT places, names and saves the factors. Its own forward, x W^T + s (x A^T) B^T, rounds in other places than the engine,
which holds one merged weight; so each wrapper gets another class, in place.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import diffusers
import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY, LORA_WEIGHT_NAME_SAFE
from peft import LoraConfig
from peft.tuners import lora
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from omni_rollout.diffusion.exact_ops import ExactLinear, merged_weight
from omni_rollout.diffusion.products import exact_linear
from omni_rollout.errors import UserError
from omni_rollout.models import family_module, family_of
from omni_rollout.models.base.policy import experts

ADAPTER = "default"
PREFIX = "transformer."  # of every name in the file; diffusers' pipelines tell their parts' adapters apart by it


class MergedLoraLinear(lora.Linear):
    """x (W + s B A)^T + b, with the sum in fp32 and rounded once to the compute dtype."""

    compute_dtype: torch.dtype
    merges: bool = True  # False: the base alone

    def effective_weight(self) -> torch.Tensor:
        if not self.merges:
            return _base(self).effective_weight()
        factor_a, factor_b = _factors(self)
        return merged_weight(_base(self).weight, factor_a, factor_b, self.scaling[ADAPTER], self.compute_dtype)

    def effective_bias(self) -> torch.Tensor | None:
        return _base(self).effective_bias()

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return exact_linear(x, self.effective_weight(), self.effective_bias())


def attach_lora(policy: nn.Module, *, rank: int, alpha: int | None = None, seed: int = 0) -> list[nn.Parameter]:
    """Freezes the policy, adds fp32 factors to its family's `LORA_TARGETS`, and returns them, the trainable ones.

    A is Gaussian with deviation 1/rank, drawn from `seed` alone; B is zero, so the policy starts where the base is. Of several
    experts each has an adapter of its own.

    Args:
        policy: a diffusers model whose linears are `ExactLinear` already, or `Experts` of such.
        alpha: the product B A is scaled by alpha / rank; None: twice the rank.

    Raises:
        UserError: a rank below 1, an adapter that is there already.
        ValueError: a target that is no `ExactLinear`, or no target at all.
    """
    if rank < 1:
        raise UserError(f"trainer.lora_rank={rank}: expected at least 1; 0 trains full weights and attaches no adapter")
    if has_lora(policy):
        raise UserError("this transformer has a LoRA adapter already; attach one to a freshly loaded transformer")
    scale = 2 * rank if alpha is None else alpha
    networks = experts(policy).values()
    return [factor for place, network in enumerate(networks) for factor in _attach(network, rank, scale, seed + place)]


def _attach(transformer: Any, rank: int, alpha: int, seed: int) -> list[nn.Parameter]:
    wanted = _family_policy(transformer).LORA_TARGETS
    endings = tuple(f".{target}" for target in wanted)
    targets = {name: layer for name, layer in transformer.named_modules() if f".{name}".endswith(endings)}
    for name, layer in targets.items():
        if not isinstance(layer, ExactLinear):
            raise ValueError(f"{name} is a {type(layer).__name__}: expected ExactLinear; install the exact operators first")
    if not targets:
        raise ValueError(f"{type(transformer).__name__} has none of the layers {', '.join(wanted)}")
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(wanted), init_lora_weights="gaussian")
    with torch.random.fork_rng(devices=[]), _seen_as_fp32(targets.values()):
        torch.default_generator.manual_seed(seed)
        transformer.add_adapter(config, adapter_name=ADAPTER)  # freezes all else
    return [factor for layer in _wrappers(transformer) for factor in _merge_in_forward(layer)]


@contextmanager
def _seen_as_fp32(layers: Iterable[nn.Module]) -> Iterator[None]:
    """PEFT rounds the factors it draws to the dtype of the weight beside them: inside, that is fp32, of one number repeated."""
    own = [(weight, weight.data) for weight in (cast(nn.Parameter, layer.weight) for layer in layers)]
    for weight, data in own:
        weight.data = torch.zeros(1, device=data.device).expand(data.shape)
    try:
        yield
    finally:
        for weight, data in own:
            weight.data = data


@contextmanager
def base_alone(transformer: nn.Module) -> Iterator[None]:
    """Inside, the transformer computes what it did before `attach_lora`, bit for bit."""
    wrappers = cast(list[MergedLoraLinear], _wrappers(transformer))
    for layer in wrappers:
        layer.merges = False
    try:
        yield
    finally:
        for layer in wrappers:
            layer.merges = True


def _family_policy(transformer: nn.Module) -> ModuleType:
    return family_module(family_of(transformer), "policy")


def without_adapted(named: Mapping[str, torch.Tensor], targets: Iterable[str]) -> dict[str, torch.Tensor]:
    """Those of a family's weights, by checkpoint name, that its adapter on `targets` leaves as they are."""
    endings = tuple(f".{target}.weight" for target in targets)
    return {name: tensor for name, tensor in named.items() if not name.endswith(endings)}


def has_lora(transformer: nn.Module) -> bool:
    return bool(_wrappers(transformer))


def save_lora(transformer: Any, folder: Path, weights: Mapping[str, torch.Tensor]) -> None:
    """Writes what `load_lora_weights(folder)` of the family's pipeline in diffusers reads, rank and alpha included.

    Args:
        weights: the factors by parameter name; those of `transformer` may be shards.
    """
    if folder.is_file():
        raise UserError(f"{folder} is a file: expected a folder to save LoRA weights in")
    factors: dict[str, Any] = get_peft_model_state_dict(transformer, state_dict=weights, adapter_name=ADAPTER)
    adapter = transformer.peft_config[ADAPTER].to_dict()
    pipeline: Any = getattr(diffusers, _family_policy(transformer).LORA_PIPELINE)
    pipeline.save_lora_weights(
        folder,
        transformer_lora_layers=factors,
        # A set has another order in every process, and the same factors shall be the same bytes.
        transformer_lora_adapter_metadata={k: sorted(v) if isinstance(v, set) else v for k, v in adapter.items()},
    )
    _sort_header(folder / LORA_WEIGHT_NAME_SAFE)


def _sort_header(path: Path) -> None:
    """safetensors writes its metadata in another order each time, and the same factors shall be the same bytes."""
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # tensors stay aligned
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[end:])


def write_unscaled(folder: Path, target: Path, dtype: torch.dtype) -> None:
    """Writes what `save_lora` wrote once more, with alpha / rank multiplied into B, and alpha equal to the rank.

    For programs that do not read alpha from the file's metadata: they add B A as it is. A scale that is a power of two, such as
    the default's, moves no bit of the merged weight.
    """
    path = folder / LORA_WEIGHT_NAME_SAFE
    tensors, rank, alpha = _read(path)
    with safe_open(path, framework="pt") as file:
        metadata = json.loads(file.metadata()[LORA_ADAPTER_METADATA_KEY])
    scaled = {name: tensor * (alpha / rank) if ".lora_B." in name else tensor for name, tensor in tensors.items()}
    target.mkdir(parents=True, exist_ok=True)
    save_file(
        {f"{PREFIX}{name}": tensor.to(dtype).contiguous() for name, tensor in scaled.items()},
        target / LORA_WEIGHT_NAME_SAFE,
        metadata={"format": "pt", LORA_ADAPTER_METADATA_KEY: json.dumps({**metadata, f"{PREFIX}lora_alpha": rank})},
    )
    _sort_header(target / LORA_WEIGHT_NAME_SAFE)


def load_lora(transformer: Any, folder: Path) -> list[nn.Parameter]:
    """Reads what `save_lora` wrote, attaching an adapter where there is none, and returns the trainable factors.

    Raises:
        UserError: no such file, another rank or alpha than the adapter's, or other layers than it has.
    """
    path = folder / LORA_WEIGHT_NAME_SAFE
    tensors, rank, alpha = _read(path)
    if not has_lora(transformer):
        attach_lora(transformer, rank=rank, alpha=alpha)
    config = transformer.peft_config[ADAPTER]
    if (rank, alpha) != (config.r, config.lora_alpha):
        raise UserError(
            f"{path} has rank {rank} and alpha {alpha}, this run has rank {config.r} and alpha {config.lora_alpha}; "
            "set trainer.lora_rank and trainer.lora_alpha to those of the file"
        )
    own = get_peft_model_state_dict(transformer, adapter_name=ADAPTER)
    check_fit(path, tensors, own)
    set_peft_model_state_dict(transformer, tensors, adapter_name=ADAPTER)
    return [parameter for parameter in transformer.parameters() if parameter.requires_grad]


def read_lora(folder: Path) -> dict[str, torch.Tensor]:
    """The factors that `save_lora` wrote, by parameter name."""
    tensors, _, _ = _read(folder / LORA_WEIGHT_NAME_SAFE)
    return {f"{name.removesuffix('.weight')}.{ADAPTER}.weight": tensor for name, tensor in tensors.items()}


def check_fit(path: Path, tensors: Mapping[str, torch.Tensor], own: Mapping[str, torch.Tensor]) -> None:
    """Raises UserError, naming a tensor, where those of a file and those of this model differ in names or shapes."""
    for name in sorted(own.keys() | tensors.keys()):
        if name not in tensors:
            raise UserError(f"{path} holds another model: it has no {name}, this one has")
        if name not in own:
            raise UserError(f"{path} holds another model: it has {name}, this one has not")
        if tensors[name].shape != own[name].shape:
            raise UserError(f"{path} holds another model: {name} is {list(tensors[name].shape)}, here {list(own[name].shape)}")


def as_saved(transformer: nn.Module, factors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Factors by parameter name, under the names that `save_lora` gives them: below their expert's folder.

    Args:
        transformer: asked for its experts alone.
    """
    prefix = PREFIX if len(experts(transformer)) == 1 else ""
    return {prefix + name.replace(f".{ADAPTER}.", "."): tensor for name, tensor in factors.items()}


def _read(path: Path) -> tuple[dict[str, torch.Tensor], int, int]:
    if not path.is_file():
        raise UserError(f"{path} does not exist: expected the folder of a LoRA checkpoint")
    with safe_open(path, framework="pt") as file:
        metadata = json.loads((file.metadata() or {}).get(LORA_ADAPTER_METADATA_KEY, "{}"))
        tensors = {name.removeprefix(PREFIX): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if f"{PREFIX}r" not in metadata:
        raise UserError(f"{path} does not say its rank and alpha: expected a file that save_lora wrote")
    return tensors, metadata[f"{PREFIX}r"], metadata[f"{PREFIX}lora_alpha"]


def _wrappers(transformer: nn.Module) -> list[lora.Linear]:
    return [layer for layer in transformer.modules() if isinstance(layer, lora.Linear)]


def _merge_in_forward(layer: lora.Linear) -> list[nn.Parameter]:
    layer.__class__ = MergedLoraLinear
    cast(MergedLoraLinear, layer).compute_dtype = _base(layer).compute_dtype
    factors = _factors(layer)
    for factor in factors:
        factor.data = factor.data.float()
    return factors


def _base(layer: lora.Linear) -> ExactLinear:
    return cast(ExactLinear, layer.get_base_layer())


def _factors(layer: lora.Linear) -> list[nn.Parameter]:
    """A [rank, in] and B [out, rank]."""
    return [cast(nn.Parameter, factors[ADAPTER].weight) for factors in (layer.lora_A, layer.lora_B)]
