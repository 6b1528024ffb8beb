"""What of a machine decides bits: device, instruction set, threads, switches; and whether two of them may work together."""

from __future__ import annotations

import os
import platform
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch

from omni_rollout.errors import PinnedKnobError

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

# cuBLAS offers the kernels that its workspace has room for. It and torch read this once, as CUDA starts: too late for
# `pin_switches`, so it is set as this module is imported, which both sides do before they touch a device.
WORKSPACE, PINNED_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
CUDA_VARIABLES = (  # others that decide which kernel multiplies; nothing sets them, so whoever did is told apart by them
    "CUBLASLT_WORKSPACE_SIZE",
    "CUBLAS_EMULATE_SINGLE_PRECISION",
    "DISABLE_ADDMM_CUDA_LT",
    "NVIDIA_TF32_OVERRIDE",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
    "TORCH_CUBLASLT_UNIFIED_WORKSPACE",
)
_here = threading.local()  # `threads`, inside of `on_one_thread`
if not torch.cuda.is_initialized():
    os.environ.setdefault(WORKSPACE, PINNED_WORKSPACE)


def compute_device() -> torch.device:
    """Where a whole policy computes, on either side: the GPU of this process, if it has one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pin_switches() -> None:
    """Sets what changes the bits of products for a whole process; on both sides the same."""
    torch.set_float32_matmul_precision("highest")
    torch.backends.mkldnn.enabled = True  # type: ignore[attr-defined]
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.benchmark = False
    _pin_cuda()


def _pin_cuda() -> None:
    """Choices among a GPU's kernels. They can be set on any machine, and change nothing without a GPU."""
    cuda = torch.backends.cuda
    cuda.matmul.allow_bf16_reduced_precision_reduction = False
    cuda.matmul.allow_fp16_reduced_precision_reduction = False
    cuda.matmul.allow_fp16_accumulation = False
    cuda.preferred_blas_library("cublas")  # TORCH_BLAS_PREFER_CUBLASLT changes it
    cuda.enable_cudnn_sdp(False)  # vLLM does so in the engine's process: Hopper would take cuDNN's kernel
    cuda.enable_flash_sdp(True)
    cuda.enable_mem_efficient_sdp(True)
    cuda.enable_math_sdp(True)
    cuda.allow_fp16_bf16_reduction_math_sdp(False)
    if torch.cuda.is_available():
        torch.cuda.tunable.enable(False)  # it chooses kernels by how long they take


def check_workspace(device: torch.device) -> None:
    """Raises PinnedKnobError where cuBLAS was started with another workspace than the pinned one."""
    found = os.environ.get(WORKSPACE)
    if device.type == "cuda" and found != PINNED_WORKSPACE:
        raise PinnedKnobError(
            f"parity=exact pins {WORKSPACE} to {PINNED_WORKSPACE}, here it is {found or 'not set'}, and CUDA has read it: "
            f"export {WORKSPACE}={PINNED_WORKSPACE} before the program starts, or import omni_rollout.diffusion.machine "
            "before anything uses the GPU"
        )


def pin_thread(threads: int) -> None:
    """Sets what holds for the calling thread alone: another thread of the process has its own.

    To be called first in every thread that computes: torch gives a new one the number that any other was last given.
    """
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
    torch.set_flush_denormal(False)


@contextmanager
def on_one_thread() -> Iterator[None]:
    """Inside, the calling thread computes alone, what is to have the bits that all its threads would give (`one_thread`)."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    _here.threads = threads
    try:
        yield
    finally:
        _here.threads = None
        torch.set_num_threads(threads)


@contextmanager
def on_all_threads() -> Iterator[None]:
    """Inside, a thread that computes alone has its others again: for what is not known to have their bits on one."""
    threads, here = threads_of_bits(), torch.get_num_threads()
    if threads == here:
        yield
        return
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(here)


def threads_of_bits() -> int:
    """Of how many threads the calling one's results have the bits."""
    return getattr(_here, "threads", None) or torch.get_num_threads()


def machine(device: torch.device) -> dict[str, Any]:
    """As it is now, for the calling thread."""
    return {
        "device": device_name(device),
        "instruction_set": instruction_set() if device.type == "cpu" else "",
        "threads": torch.get_num_threads() if device.type == "cpu" else 0,
        "torch": str(torch.__version__),
        "switches": _switches(device),
    }


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return _of_the_cpu("model name") or platform.processor() or platform.machine()


def _of_the_cpu(field: str) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(field)), "")


@cache
def float32_by_onednn() -> bool:
    """Whether products in float32 are asked of oneDNN on this CPU, on both sides, and not of MKL, as torch would.

    On a CPU that Intel did not make, MKL leaves AVX-512 unused: half as fast as oneDNN (docs/LOG.md). bf16 is oneDNN's anyway.
    """
    has_both = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    return has_both and _of_the_cpu("vendor_id") not in ("", "GenuineIntel")


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


def _switches(device: torch.device) -> str:
    """Each that is not as `pin_switches` and `pin_thread` set it, or `pinned`; on a GPU the workspace too."""
    cuda, precision = torch.backends.cuda, torch.get_float32_matmul_precision()
    as_pinned = {
        f"float32_matmul_precision={precision}": precision == "highest",
        "mkldnn.enabled=False": torch.backends.mkldnn.enabled,  # type: ignore[attr-defined]
        "flush_denormal=True": bool(torch.full((1,), 1e-39).mul(0.5)),
        "cudnn.allow_tf32=True": not torch.backends.cudnn.allow_tf32,
        "cudnn.benchmark=True": not torch.backends.cudnn.benchmark,
        "bf16_reduced_precision_reduction=True": not cuda.matmul.allow_bf16_reduced_precision_reduction,
        "fp16_reduced_precision_reduction=True": not cuda.matmul.allow_fp16_reduced_precision_reduction,
        "fp16_accumulation=True": not cuda.matmul.allow_fp16_accumulation,
        "blas=cublaslt": cuda.preferred_blas_library() == torch._C._BlasBackend.Cublas,
        "cudnn_sdp=True": not cuda.cudnn_sdp_enabled(),
        "flash_sdp=False": cuda.flash_sdp_enabled(),
        "mem_efficient_sdp=False": cuda.mem_efficient_sdp_enabled(),
    }
    found = [name for name, pinned in as_pinned.items() if not pinned]
    if device.type == "cuda":
        found += _cuda_switches()
    return ", ".join(found) or "pinned"


def _cuda_switches() -> list[str]:
    """What only a process with a GPU can be asked for."""
    found = ["tunable=True"] if torch.cuda.tunable.is_enabled() else []
    found += [f"{name}={os.environ[name]}" for name in CUDA_VARIABLES if name in os.environ]
    if os.environ.get(WORKSPACE) != PINNED_WORKSPACE:
        found.append(f"{WORKSPACE}={os.environ.get(WORKSPACE)}")
    if hasattr(torch._C, "_cuda_getCublasWorkspaceSize"):  # torch 2.13 says what it took; a call may have changed it
        found.append(f"cuBLAS workspace of {torch.backends.cuda.cublas_workspace_size()} bytes")
    return found


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """The fields, in words, that keep one from scoring what the other sampled, bit for bit. Empty: nothing does.

    Another device or instruction set is no difference where the self-check computed the same bits on both (`kernels`).
    """
    fields = MUST_AGREE if there.get("kernels") == here.get("kernels") else (*MAY_DIFFER, *MUST_AGREE)
    found = [f"{name} ({there.get(name)!r}, here {here.get(name)!r})" for name in fields if there.get(name) != here.get(name)]
    if not found and there.get("kernels") != here.get("kernels"):
        found.append("kernels (the self-check's results have other bits)")
    return found
