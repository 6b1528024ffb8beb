"""What of a machine decides bits: device, instruction set, threads, switches; and whether two of them may work together."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

# oneDNN's instruction sets, weakest first, by the names that ONEDNN_MAX_CPU_ISA takes; what a CPU must say to have one.
_ISAS = (
    ("SSE41", lambda: True),
    ("AVX2", lambda: torch.cpu._is_avx2_supported()),
    ("AVX512_CORE", lambda: torch.cpu._is_avx512_supported()),
    ("AVX512_CORE_BF16", lambda: torch.cpu._is_avx512_bf16_supported()),
    ("AVX512_CORE_AMX", lambda: torch.cpu._is_amx_tile_supported()),
)
_CAPS = {"AVX": "SSE41", "AVX2_VNNI": "AVX2", "AVX2_VNNI_2": "AVX2", "AVX512_CORE_VNNI": "AVX512_CORE"}  # what a cap leaves
_CAPS["AVX512_CORE_FP16"] = "AVX512_CORE_BF16"
MUST_AGREE = ("threads", "calls", "torch", "switches")  # of a rollout and of who scores it, whatever else is shown to be equal
MAY_DIFFER = ("device", "instruction_set")  # where the self-check found the same bits on both


def pin_switches() -> None:
    """Sets what changes the bits of products for a whole process; on both sides the same."""
    torch.set_float32_matmul_precision("highest")
    torch.backends.mkldnn.enabled = True  # type: ignore[attr-defined]
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.benchmark = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    torch.backends.cuda.enable_cudnn_sdp(False)  # vLLM does so in the engine's process: Hopper would take cuDNN's kernel


def pin_thread(threads: int) -> None:
    """Sets what holds for the calling thread alone: another thread of the process has its own."""
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
    torch.set_flush_denormal(False)


def machine(device: torch.device) -> dict[str, Any]:
    """As it is now, for the calling thread."""
    return {
        "device": device_name(device),
        "instruction_set": instruction_set() if device.type == "cpu" else "",
        "threads": torch.get_num_threads() if device.type == "cpu" else 0,
        "torch": torch.__version__,
        "switches": _switches(),
    }


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def instruction_set() -> str:
    """What torch's own kernels and oneDNN's may use here, as `torch ..., oneDNN ...`."""
    return f"torch {torch.backends.cpu.get_cpu_capability()}, oneDNN {onednn_isa()}"


def onednn_isa() -> str:
    """The strongest instruction set of this CPU that ONEDNN_MAX_CPU_ISA leaves to oneDNN."""
    names = [name for name, _ in _ISAS]
    cap = (os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA") or "").upper()
    cap = _CAPS.get(cap, cap)
    allowed = _ISAS[: names.index(cap) + 1] if cap in names else _ISAS
    return [name for name, has in allowed if has()][-1]


def _switches() -> str:
    """Each that is not as `pin_switches` and `pin_thread` set it, or `pinned`."""
    matmul = torch.backends.cuda.matmul
    found = {
        f"float32_matmul_precision={torch.get_float32_matmul_precision()}": torch.get_float32_matmul_precision() == "highest",
        "mkldnn.enabled=False": torch.backends.mkldnn.enabled,  # type: ignore[attr-defined]
        "flush_denormal=True": bool(torch.full((1,), 1e-39).mul(0.5)),
        "cudnn.allow_tf32=True": not torch.backends.cudnn.allow_tf32,
        "bf16_reduced_precision_reduction=True": not matmul.allow_bf16_reduced_precision_reduction,
    }
    return ", ".join(name for name, as_pinned in found.items() if not as_pinned) or "pinned"


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """The fields, in words, that keep one from scoring what the other sampled, bit for bit. Empty: nothing does.

    Another device or instruction set is no difference where the self-check computed the same bits on both (`kernels`).
    """
    fields = MUST_AGREE if there.get("kernels") == here.get("kernels") else (*MAY_DIFFER, *MUST_AGREE)
    found = [f"{name} ({there.get(name)!r}, here {here.get(name)!r})" for name in fields if there.get(name) != here.get(name)]
    if not found and there.get("kernels") != here.get("kernels"):
        found.append("kernels (the self-check's results have other bits)")
    return found
