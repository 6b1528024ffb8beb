"""Whether parity=exact can be had on this machine: what `doctor` has a fresh interpreter find out.

    python -m omni_rollout.launch.machine_check [CHECKPOINT]

Prints a line of JSON for each finding, as `[name, ok, text]`. Imported, it loads nothing heavy.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from safetensors import safe_open

_PRODUCT = (
    "import torch; a = torch.ones(64, 64, dtype=torch.bfloat16); a @ a; torch.conv1d(torch.ones(1, 8, 9), torch.ones(8, 8, 3))"
)
_TOLD = (  # words in oneDNN's own line, the strongest first -> the name in `diffusion.machine`
    ("AMX", "AVX512_CORE_AMX"),
    ("bfloat16", "AVX512_CORE_BF16"),
    ("AVX-512", "AVX512_CORE"),
    ("AVX2", "AVX2"),
)
_QWEN_IMAGE = {  # (out, in) of its layers, 24 heads of 128
    "to_q": (3072, 3072),
    "net.0.proj": (12288, 3072),
    "net.2": (3072, 12288),
    "img_mod": (18432, 3072),
    "txt_in": (3072, 3584),
    "img_in": (3072, 64),
    "proj_out": (64, 3072),
    "time_text_embed": (3072, 256),
    "norm_out": (6144, 3072),
}
Finding = tuple[str, bool, str]


def findings(checkpoint: Path | None) -> Iterator[Finding]:
    """Of this machine, and of a self-check of Qwen-Image's layers and of those of `checkpoint`, in both dtypes."""
    import torch

    from omni_rollout.diffusion.machine import instruction_set, machine, onednn_isa, pin_switches
    from omni_rollout.diffusion.self_check import Layer, self_check
    from omni_rollout.errors import PinnedKnobError

    pin_switches()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    here = machine(device)
    yield "machine", True, f"{here['device']}, {os.cpu_count()} cores, {here['threads']} threads, switches {here['switches']}"
    yield from _instruction_set(instruction_set(), onednn_isa())
    models = {"qwen_image": (_QWEN_IMAGE, 24, 128)}
    if checkpoint is not None:
        models = {"nano": _shapes(checkpoint), **models}
    for name, (shapes, heads, head_dim) in models.items():
        layers = [Layer(layer, *shape) for layer, shape in shapes.items()]
        for dtype in (torch.float32, torch.bfloat16):
            words = (
                f"{str(dtype).removeprefix('torch.')}, {heads} heads of {head_dim}, {len(set(shapes.values()))} layer shapes"
            )
            try:
                checked = self_check(layers, heads=heads, head_dim=head_dim, dtype=dtype, device=device)
            except PinnedKnobError as error:
                yield f"exact {name}", False, f"{words}: {error}"
            else:
                text = (
                    f"{words}: a row's bits do not depend on its company, {checked['calls']}; kernels {checked['kernels'][:12]}"
                )
                yield f"exact {name}", True, text


def _instruction_set(here: str, assumed: str) -> Iterator[Finding]:
    """What torch and oneDNN use, and whether oneDNN says the same of itself."""
    told = onednn_says()
    if told is None:
        yield "instructions", True, f"{here}; oneDNN itself said nothing"
        return
    name = next((name for words, name in _TOLD if words in told), None)
    if name is None or name == assumed:
        yield "instructions", True, f"{here}; oneDNN itself: {told}"
    else:
        text = f"oneDNN itself says {told!r}, which is {name}: fingerprints name the wrong one; please report this"
        yield "instructions", False, f"{here}; {text}"


def onednn_says() -> str | None:
    """What it prints of itself when it first works in an interpreter."""
    environment = {**os.environ, "ONEDNN_VERBOSE": "1"}
    done = subprocess.run([sys.executable, "-c", _PRODUCT], capture_output=True, text=True, env=environment, check=False)
    found = [line.partition("isa:")[2].strip() for line in done.stdout.splitlines() if "cpu,isa:" in line]
    return found[0] if found else None


def _shapes(checkpoint: Path) -> tuple[dict[str, tuple[int, int]], int, int]:
    """(layers, heads, channels of a head) of a checkpoint's transformer, from its headers."""
    folder = checkpoint / "transformer"
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    shapes: dict[str, tuple[int, int]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118, it is no mapping
                shape = tuple(file.get_slice(name).get_shape())
                if name.endswith(".weight") and len(shape) == 2:
                    shapes[name] = (shape[0], shape[1])
    return shapes, config["num_attention_heads"], config["attention_head_dim"]


if __name__ == "__main__":
    for finding in findings(Path(sys.argv[1]) if sys.argv[1:] else None):
        print(json.dumps(finding), flush=True)
