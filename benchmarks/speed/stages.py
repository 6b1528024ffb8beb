"""Where the time of a round of ours goes, beside what the bare transformer takes for it; and what its kernels take."""

from __future__ import annotations

import os
import statistics
from collections import defaultdict
from typing import Any

from benchmarks.speed.contenders import EXACT, FLOOR, Ours, make
from benchmarks.speed.shapes import Shape
from benchmarks.speed.turns import Process, rounds, together

KERNELS = {
    "products": ("mkldnn::_linear_pointwise", "aten::addmm", "aten::mm", "aten::mkldnn_linear"),
    "attention": ("aten::_scaled_dot_product_flash_attention_for_cpu", "aten::_scaled_dot_product_attention_math"),
}
BY_PRODUCTS = "_Attention"  # ours of many tokens: what is multiplied inside is attention's


class Watched(Ours):
    """Our engine, whose stages are timed."""

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape, "exact")

    def staged(self, number: int) -> dict[str, float]:
        """Seconds of a round by stage."""
        from omni_rollout.run.profile import Stages

        stages = Stages()
        with stages.of_engine(self.engine):
            self.round(number)
        return {name: spent.seconds for name, spent in stages.spent.items()}

    def kernels(self, number: int) -> dict[str, float]:
        """Seconds of a round by KERNELS, in the thread that denoises: what any engine with the same kernels has to take."""
        from torch._C._profiler import _ExperimentalConfig
        from torch.profiler import ProfilerActivity, profile

        all_threads = _ExperimentalConfig(profile_all_threads=True)
        with profile(activities=[ProfilerActivity.CPU], experimental_config=all_threads) as trace:
            self.round(number)
        found: dict[int, dict[str, float]] = defaultdict(lambda: dict.fromkeys(KERNELS, 0.0))
        for event in trace.events() or ():
            if event.name == BY_PRODUCTS:
                found[event.thread]["attention"] += event.cpu_time_total / 1e6
            for kind, names in KERNELS.items():
                if event.name in names and (event.cpu_parent is None or event.cpu_parent.name != BY_PRODUCTS):
                    found[event.thread][kind] += event.self_cpu_time_total / 1e6
        return max(found.values(), key=lambda spent: spent["products"])


def stages(shape: Shape, number: int) -> dict[str, Any]:
    """Medians of `number` rounds, in turns with the floor; the first is not counted."""
    processes = {
        EXACT: Process(f"stages, {shape.name}", Watched, shape, threads=shape.threads),
        FLOOR: Process(f"floor, {shape.name}", make, FLOOR, shape, threads=shape.threads),
    }
    taken: dict[str, list[float]] = {name: [] for name in processes}
    found: dict[str, list[float]] = {}
    with together(processes):
        for turn, order in rounds(list(processes), number + 1):
            for name in order:
                value, seconds = processes[name].ask("staged" if name == EXACT else "round", turn)
                if turn > 1:
                    taken[name].append(seconds)
                    for stage, spent in (value or {}).items():
                        found.setdefault(stage, []).append(spent)
        kernels = processes[EXACT].ask("kernels", number + 2)[0]
    medians = {stage: statistics.median(each) for stage, each in found.items()}
    whole = {name: statistics.median(each) for name, each in taken.items()}
    return {"shape": shape.name, "load": os.getloadavg()[0], "seconds": whole, "stages": medians, "kernels": kernels}
