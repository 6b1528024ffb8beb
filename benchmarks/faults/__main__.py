"""Breaks runs on purpose, and compares what they give with runs that nobody touched.

    .venv/bin/python -m benchmarks.faults --out runs/faults
    .venv/bin/python -m benchmarks.faults --only "trainer rank" "process"

Writes faults.json and faults.md. Exit status 1: a promise was not kept.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

from benchmarks.faults import embedded, on_ray
from benchmarks.faults.figures import HEAD, Row, rows_of
from benchmarks.faults.scene import STEPS, Scene, SceneError
from benchmarks.faults.witness import differences
from omni_rollout.nano.random_weights import build_random

NAMES = (*embedded.FAULTS, *(name for faults in on_ray.FAULTS.values() for name in faults))


class Bench:
    """All scenes under one folder, one after another; `failures` are those that did not come to their end."""

    def __init__(self, root: Path, model: Path) -> None:
        self._root, self._model = root, model
        self.rows: list[Row] = []
        self.failures: list[str] = []

    def run(self, wanted: set[str]) -> None:
        reference = self._play("undisturbed, embedded", "embedded", embedded.undisturbed)
        for name in (name for name in embedded.FAULTS if name in wanted):
            scene = self._play(name, "embedded", lambda scene, name=name: embedded.FAULTS[name](scene, reference))
            self._add(scene, reference, embedded.CHANGES_LATER_STEPS.get(name))
        for backend, faults in on_ray.FAULTS.items():
            if not wanted & faults.keys():
                continue
            spread = self._play(f"undisturbed, {backend}", backend, on_ray.undisturbed)
            if backend == "verl":  # one rank; two round elsewhere
                found = differences(spread.run_dir, spread.witness, reference.run_dir, reference.witness, STEPS["embedded"])
                self.failures += [f"verl is not the embedded run: {what}" for what in found]
            scene = self._play(f"many, {backend}", backend, lambda scene: on_ray.many(scene, wanted))
            self._add(scene, spread)

    def _play(self, name: str, backend: str, act: Callable[[Scene], None]) -> Scene:
        start = time.monotonic()
        scene = Scene(self._root / name.replace(", ", "-").replace(" ", "-"), self._model, backend)
        try:
            with scene:
                act(scene)
        except SceneError as error:
            self.failures.append(f"{name}: {error}")
        print(f"{name}: {time.monotonic() - start:.0f} s", flush=True)
        return scene

    def _add(self, scene: Scene, reference: Scene, same: int | None = None) -> None:
        for row in rows_of(scene, reference, same=same):
            print(row.as_markdown(), flush=True)
            self.rows.append(row)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for faults.json, faults.md and the runs (default: a temporary one)")
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES, metavar="NAME", help=f"of {', '.join(NAMES)}")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # by way of the scenes, which end what they started
    out = arguments.out or Path(tempfile.mkdtemp(prefix="faults-"))
    out.mkdir(parents=True, exist_ok=True)
    root = Path(tempfile.mkdtemp(prefix="scenes-", dir=out))
    bench, start, load = Bench(root, build_random(root / "model")), datetime.now().astimezone(), os.getloadavg()[2]
    bench.run(set(arguments.only))
    took = f"{start:%Y-%m-%d %H:%M}, {(datetime.now().astimezone() - start).total_seconds():.0f} s"
    took += f", {os.cpu_count()} cores, load average {load:.1f} at the start, {os.getloadavg()[2]:.1f} at the end (15 minutes)"
    table = [HEAD, " | ".join(["---"] * len(HEAD.split(" | "))), *[row.as_markdown() for row in bench.rows]]
    (out / "faults.md").write_text("\n".join([took, "", *[f"| {line} |" for line in table], "", *bench.failures]) + "\n")
    result = {"run": took, "rows": [row.as_json() for row in bench.rows], "failures": bench.failures}
    (out / "faults.json").write_text(json.dumps(result, indent=2))
    print((out / "faults.md").read_text())
    return 0 if bench.rows and all(row.good for row in bench.rows) and not bench.failures else 1


if __name__ == "__main__":
    sys.exit(main())
