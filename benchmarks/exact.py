"""Whether rollout and recomputation agree bit for bit under every instruction set of this CPU and any number of threads.

    python -m benchmarks.exact                      # prints the table and writes it into docs/parity.md
    python -m benchmarks.exact --quick --docs none  # a minute: nano in few cells

A process for each instruction set, since its variables are read when torch loads. Exit status 1: something was not exact.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from benchmarks import exact_sides

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- make exact: begin -->", "<!-- make exact: end -->"
FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16")  # of /proc/cpuinfo: what a table is worth knowing for
ONEDNN = {"AVX2": "avx2", "AVX512_CORE": "avx512f", "AVX512_CORE_BF16": "avx512_bf16", "": ""}  # cap -> flag that makes it one
MODELS = {"nano": "nano", "random16": "random, 16 layers", "wide": "random, one block of 24 x 128"}
JOBS = {
    "cells": "the matrix",
    "few": "guidance 4, 3 in flight",
    "update": "after an update of all weights",
    "lora": "after one with LoRA of rank 64",
    "large": "512x512, alone and beside smaller ones",
}
ONLY_FP32 = ("float32",)  # where oneDNN has more than AVX2 and torch has not, torch's attention in bf16 ends in an error
HEAD = ("oneDNN", "torch", "threads", "model", "what", "cells exact: fp32", "bf16", "log-probs equal", "largest KL")


@dataclass(frozen=True)
class Setting:
    """One process: what it may use, and what it is to do there, as (threads, model, job)."""

    onednn: str
    aten: str
    work: tuple[tuple[int, str, str], ...]
    dtypes: tuple[str, ...] = ("bfloat16", "float32")

    def environment(self) -> dict[str, str]:
        given = {"ONEDNN_MAX_CPU_ISA": self.onednn, "ATEN_CPU_CAPABILITY": self.aten}
        rest = {name: value for name, value in os.environ.items() if name not in given}
        return {**rest, **{name: value for name, value in given.items() if value}, "OMP_WAIT_POLICY": "passive"}


def settings(quick: bool) -> Iterator[Setting]:
    """The ones that are most likely to differ first."""
    if quick:
        yield Setting("", "", ((2, "nano", "few"),))
        yield Setting("AVX2", "avx2", ((1, "nano", "few"),))
        return
    caps = [cap for cap, flag in ONEDNN.items() if not flag or flag in cpu_flags()]
    yield Setting("", "", tuple((2, "wide", job) for job in ("cells", "update", "lora", "large")))
    yield Setting("", "", ((2, "nano", "cells"), (2, "random16", "cells"), *((n, "nano", "cells") for n in (1, 3, 5, 7))))
    nano = ((2, "nano", "cells"), (1, "nano", "cells"))
    for cap in reversed(caps[:-1]):  # the slowest last: bf16 without instructions for it
        yield Setting(cap, "", ((2, "wide", "few"), *nano))
    yield Setting("", "avx2", ((2, "wide", "few"), *nano), ONLY_FP32)
    yield Setting("", "", ((1, "wide", "few"),))
    for cap in reversed(caps[:-1]):
        yield Setting(cap, "avx2", nano, ONLY_FP32 if cap != "AVX2" else ("bfloat16", "float32"))


def run(setting: Setting, models: dict[str, str]) -> Iterator[dict[str, Any]]:
    """Results as they come; a process that ends badly is one too."""
    work = [(threads, name, models[name], job) for threads, name, job in setting.work]
    command = [sys.executable, "-m", "benchmarks.exact_sides", json.dumps(work), *setting.dtypes]
    with tempfile.TemporaryFile("w+") as errors:
        with subprocess.Popen(
            command, cwd=ROOT, env=setting.environment(), stdout=subprocess.PIPE, stderr=errors, text=True
        ) as process:
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith(exact_sides.MARK):
                    yield {"onednn": setting.onednn, "aten": setting.aten, **json.loads(line.removeprefix(exact_sides.MARK))}
        if process.returncode:
            errors.seek(0)
            yield {"onednn": setting.onednn, "aten": setting.aten, "failed": errors.read()[-2000:]}


def table(results: Sequence[dict[str, Any]]) -> list[str]:
    """In Markdown: a row for each setting, model and job, both dtypes in it."""
    rows: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = {}
    for found in results:
        if "failed" not in found:
            key = (*found["instruction_set"].split(", "), found["threads"], found["model"], found["job"])
            rows.setdefault(key, {})[found["dtype"]] = found
    lines = [f"| {' | '.join(HEAD)} |", f"|{'---|' * len(HEAD)}"]
    for (aten, onednn, threads, model, job), found in rows.items():
        cells = [f"{f['exact']} / {f['cells']}" if (f := found.get(dtype)) else "-" for dtype in ("float32", "bfloat16")]
        equal, whole = (sum(f[name] for f in found.values()) for name in ("equal", "log_probs"))
        kl = max(f["kl"] for f in found.values())
        words = (
            onednn.split()[1],
            aten.split()[1],
            threads,
            MODELS[model],
            JOBS[job],
            *cells,
            f"{equal} / {whole}",
            f"{kl:.2g}",
        )
        lines.append(f"| {' | '.join(map(str, words))} |")
    return lines


def write_docs(lines: Sequence[str], path: Path) -> None:
    """Between the markers, with the machine's name, its flags and the date; other machines' tables stay."""
    flags = " ".join(flag for flag in FLAGS if flag in cpu_flags())
    machine = f"{cpu_name()}, {os.cpu_count()} cores, flags {flags}; "
    before, _, rest = path.read_text(encoding="utf-8").partition(BEGIN)
    between, _, after = rest.partition(END)
    tables = [found.strip() for found in re.split(r"\n(?=[^|\n].*, flags )", between)]
    kept = [found for found in tables if ", flags " in found and not found.startswith(machine)]
    mine = "\n".join((f"{machine}{date.today().isoformat()}:", "", *lines))
    path.write_text("\n".join((before + BEGIN, "\n\n".join([*kept, mine]), END)) + after, encoding="utf-8")


def cpu_flags() -> set[str]:
    return set(_cpuinfo("flags").split())


def cpu_name() -> str:
    return _cpuinfo("model name") or "a CPU without a name"


def _cpuinfo(wanted: str) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == wanted), "")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--docs", default=str(ROOT / "docs" / "parity.md"), metavar="FILE", help="none: leave it as it is")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every result, a line each, as it comes")
    arguments = parser.parse_args()
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        models = make_models(Path(folder), arguments.quick)
        for setting in settings(arguments.quick):
            for found in run(setting, models):
                results.append(found)
                print(json.dumps(found), file=sys.stderr, flush=True)
                if arguments.json is not None:
                    arguments.json.write_text("".join(json.dumps(result) + "\n" for result in results))
    lines = table(results)
    print("\n".join(lines))
    if arguments.docs != "none":
        write_docs(lines, Path(arguments.docs))
    wrong = [found for found in results if "failed" in found or found["exact"] < found["cells"]]
    for found in wrong:
        print(f"NOT EXACT: {found}")
    return 1 if wrong or not results else 0


def make_models(folder: Path, quick: bool) -> dict[str, str]:
    made = {"nano": str(ROOT / "recipes" / "nano" / "checkpoint")}
    if not quick:
        from omni_rollout.nano.random_weights import build_random

        made["random16"] = str(build_random(folder / "random16", layers=16, seed=3))
        made["wide"] = str(build_random(folder / "wide", layers=1, heads=24, head_dim=128, seed=3))
    return made


if __name__ == "__main__":
    sys.exit(main())
