"""Writes the tables and plots of docs/scaling.md.

python -m benchmarks.simulation
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.simulation.cluster import Cluster, Outcome, Simulation, UpFront
from benchmarks.simulation.plots import Band, bars, lines
from benchmarks.simulation.sync import Sync, sync_seconds
from benchmarks.simulation.workloads import FITTED_TO, MEASURED, QWEN_ENGINE, fitted_engine, mixed, predicted, uniform
from omni_rollout.types import RolloutRequest

DOCS = Path(__file__).parents[2] / "docs"
SIZES = (8, 64, 512)
SEEDS = range(5)
STORE = 0.006  # seconds of the agent loop for a trajectory of 3.4 MB: measure.py store
BASE = Cluster(workers=64, engine=QWEN_ENGINE, slowdown=0.1, store=STORE)
PICKLED = Sync(threads=1, put=0.96, get=2.7)
ONE_THREAD = Sync(threads=1)
NOW = Sync(threads=8)  # of the up to 16 that `digest.tensor_digests` takes

Row = Sequence[str]


def run(cluster: Cluster, requests: Sequence[RolloutRequest], up_front: bool = False) -> list[Outcome]:
    return [
        Simulation(cluster, requests, seed, UpFront(requests, range(cluster.workers)) if up_front else None).run()
        for seed in SEEDS
    ]


def band(values: Sequence[float]) -> Band:
    return min(values), statistics.median(values), max(values)


def efficiency(outcomes: Sequence[Outcome]) -> Band:
    return band([100 * outcome.ideal / outcome.seconds for outcome in outcomes])


def shown(values: Band, unit: str = "") -> str:
    digits = 0 if values[1] >= 20 else 1
    return f"{values[1]:.{digits}f} ({values[0]:.{digits}f} to {values[2]:.{digits}f}){unit}"


def table(head: Row, rows: Sequence[Row]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])


def validation() -> str:
    rows = []
    for case, measured in MEASURED.items():
        guess = predicted(case)
        role = "fitted" if case in FITTED_TO else f"{100 * (guess / measured - 1):+.0f} %"
        rows.append([case, f"{measured:.2f}", f"{guess:.2f}", role])
    return table(["16 images, nano", "measured s", "model s", "error"], rows)


def images() -> str:
    """The share of the ideal throughput, by images per worker and step."""
    counts = (1, 2, 4, 8, 16, 32, 64)
    curves = {
        f"{workers} workers": [efficiency(run(replace(BASE, workers=workers), uniform(workers * n))) for n in counts]
        for workers in SIZES
    }
    plot = lines("Rollout throughput, of the ideal", "images per worker and step", [str(n) for n in counts], curves)
    (DOCS / "scaling-images.svg").write_text(plot)
    rows = [[name, *[f"{median:.0f}" for _, median, _ in bands]] for name, bands in curves.items()]
    return table(["% of the ideal, images per worker and step", *map(str, counts)], rows)


def policies() -> str:
    rows = []
    joined = replace(BASE, engine=replace(QWEN_ENGINE, takes_while_running=True))
    for name, make in (("uniform", uniform), ("mixed sizes and steps", mixed)):
        for per_worker in (8, 32):
            requests = make(64 * per_worker)
            rows.append(
                [
                    f"{name}, {per_worker} a worker",
                    shown(efficiency(run(BASE, requests, up_front=True))),
                    shown(efficiency(run(BASE, requests))),
                    shown(efficiency(run(joined, requests))),
                ]
            )
    return table(["64 workers, % of the ideal", "all shared out at once", "Dispatcher", "Dispatcher, joining batches"], rows)


def batch_sizes() -> str:
    """Against the ideal at 16 in a batch: how much a batch is worth, less what it takes from balance."""
    sizes = (1, 2, 4, 8, 16)
    nano = replace(fitted_engine(), token=fitted_engine().token * 40 / 2560)  # as if its images had as many tokens
    curves: dict[str, list[Band]] = {}
    for name, engine in (("Qwen-Image", QWEN_ENGINE), ("nano on a core", nano)):
        for per_worker in (8, 32):
            requests = uniform(64 * per_worker)
            ideal = Simulation(Cluster(workers=64, engine=replace(engine, max_num_seqs=16)), requests, 0).run().ideal
            curves[f"{name}, {per_worker} a worker"] = [
                band(
                    [
                        100 * ideal / o.seconds
                        for o in run(replace(BASE, engine=replace(engine, max_num_seqs=n), store=0.0), requests)
                    ]
                )
                for n in sizes
            ]
    (DOCS / "scaling-batch.svg").write_text(
        lines("64 workers: throughput, of the ideal", "rollout.max_num_seqs", [str(n) for n in sizes], curves)
    )
    rows = [[name, *[f"{median:.0f}" for _, median, _ in bands]] for name, bands in curves.items()]
    return table(["% of the ideal at 16, max_num_seqs", *map(str, sizes)], rows)


def failures() -> str:
    rows = []
    for workers in SIZES:
        requests = uniform(32 * workers)
        calm = statistics.median(outcome.seconds for outcome in run(replace(BASE, workers=workers), requests))
        row = [f"{workers} workers, {calm:.0f} s without"]
        for hangs, timeout in ((0.0, 600.0), (1.0, 600.0), (1.0, 60.0)):
            shaken = replace(BASE, workers=workers, failures=0.5, hangs=hangs, timeout=timeout)
            outcomes = run(shaken, requests)
            lost = band([100 * (outcome.redone + outcome.down) for outcome in outcomes])
            row.append(f"{shown(band([o.seconds for o in outcomes]), ' s')}; {lost[1]:.1f} %")
        rows.append(row)
    head = [
        "one failure in 2 hours per worker: seconds; lost with workers",
        "crashes",
        "hangs, time-out 600 s",
        "hangs, time-out 60 s",
    ]
    return table(head, rows)


def agent_loop() -> str:
    rows = []
    for workers in SIZES:
        requests = uniform(32 * workers)
        row = [f"{workers} workers"]
        for store in (0.0, STORE, 4 * STORE):
            row.append(shown(efficiency(run(replace(BASE, workers=workers, store=store), requests))))
        rows.append(row)
    return table(
        ["% of the ideal, agent loop per trajectory", "0 ms", f"{1000 * STORE:.0f} ms", f"{4000 * STORE:.0f} ms"], rows
    )


def syncs() -> str:
    rows, stacks = [], {}
    kinds = {
        "tensors pickled, 1 thread": PICKLED,
        "memory shared, 1 thread": ONE_THREAD,
        "memory shared, 8 threads": NOW,
        "the same, nodes 25 GB/s apart": replace(NOW, link=25.0),
    }
    for name, sync in kinds.items():
        for workers in SIZES:
            seconds = sync_seconds(sync, workers)
            alone = sync_seconds(replace(sync, peers=False), workers)
            parts = [seconds.publish, seconds.transfer, seconds.adopt, seconds.total, alone.total]
            rows.append([f"{name}, {workers} workers", *[f"{part:.0f}" if part >= 10 else f"{part:.1f}" for part in parts]])
    for label, sync in (("pickled", PICKLED), ("shared", ONE_THREAD), ("threads", NOW)):
        for workers in SIZES[::2]:
            seconds = sync_seconds(sync, workers)
            stacks[f"{workers} {label}"] = {"publish": seconds.publish, "transfer": seconds.transfer, "adopt": seconds.adopt}
    (DOCS / "scaling-sync.svg").write_text(bars("One weight sync of 41 GB", "workers, how", stacks, 250, "s"))
    return table(["seconds", "publish", "transfer", "adopt", "all", "all, without peers"], rows)


def buckets() -> str:
    rows = [
        [f"{megabytes} MB", *[f"{sync_seconds(replace(NOW, bucket=megabytes / 954), w).transfer:.1f}" for w in SIZES[1:]]]
        for megabytes in (64, 128, 256, 512, 1024)
    ]
    return table(["bucket", "transfer to 8 nodes, s", "to 64 nodes, s"], rows)


def steps() -> str:
    """Worker-seconds of a step without the trainer's, by what they went into."""
    rows, stacks = [], {}
    for kind, count in (("512 images", lambda _: 512), ("32 a worker", lambda workers: 32 * workers)):
        for workers in SIZES:
            outcomes = run(replace(BASE, workers=workers, failures=0.01), uniform(count(workers)))
            sync = sync_seconds(NOW, workers).total
            mean: Callable[[str], float] = lambda part, o=outcomes: statistics.mean(getattr(x, part) * x.seconds for x in o)  # noqa: E731
            seconds = {
                "useful": mean("useful"),
                "idle at the end": mean("idle"),
                "lost": mean("redone") + mean("down"),
                "sync": sync,
            }
            whole = sum(seconds.values())
            shares = {part: 100 * value / whole for part, value in seconds.items()}
            stacks[f"{workers}: {kind}"] = shares
            rows.append([f"{workers} workers, {kind}", f"{whole:.0f}", *[f"{share:.1f}" for share in shares.values()]])
    plot = bars("Where the engines' time goes", "workers: images a step", stacks, 100, "%")
    (DOCS / "scaling-step.svg").write_text(plot)
    return table(["a step", "seconds", "useful %", "idle at the end %", "lost with workers %", "sync %"], rows)


TABLES = (validation, images, policies, batch_sizes, failures, agent_loop, syncs, buckets, steps)


def main() -> None:
    page = (DOCS / "scaling.md").read_text(encoding="utf-8")
    for make in TABLES:
        text = make()
        pattern = rf"(<!-- {make.__name__} -->\n).*?(\n<!-- end -->)"
        page, found = re.subn(pattern, lambda match, text=text: match[1] + text + match[2], page, count=1, flags=re.DOTALL)
        assert found, f"docs/scaling.md has no place for {make.__name__}"
    (DOCS / "scaling.md").write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
