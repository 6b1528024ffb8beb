"""What each of two colocated processes takes, an engine and a rank of FSDP2 or ZeRO-3: peaks of rollout, update and sync.

    python -m benchmarks.memory_colocated --parameters 0.17e9
    python -m benchmarks.memory_colocated --parameters 1e9 --engines fsdp2 --kinds lora --json memory.json
    python -m benchmarks.memory_colocated --parameters 0.9e9 --engines fsdp2 --kinds full -- trainer.reduce=backward

Each row is a run of its own (`backend=verl rollout.placement=colocated trainer.ranks=2`, two steps), over the models and with
the settings of `benchmarks.memory`. From outside, the PSS of every process of the run is read, some fifty times a second of
the two that compute, with what Ray has each of them called meanwhile: that names the phase. A row with a transformer of next
to nothing is the constant of an engine. The processes of the run that do not compute (driver, TaskRunner, agent loop, reward
worker, TransferQueue) are summed, and Ray's own (raylet, GCS, agents, idle workers) are summed apart.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import psutil

from benchmarks.memory import ENVIRONMENT, OF_BLOCK, SETTINGS, build, mib
from omni_rollout.config import TrainConfig

RANKS = 2
RANK = "ray::ColocatedRank"
IDLE = "ray::IDLE"
METHODS = {"generate": "rollout", "load": "rollout", "update_policy": "update", "publish": "sync", "save_checkpoint": "save"}
ENGINES = {
    "fsdp2": ("trainer.engine=fsdp2",),
    "zero3": ("trainer.engine=deepspeed", "trainer.zero_stage=3"),
}
KINDS = {"lora": ("trainer.lora_rank=32",), "full": ("trainer.lora_rank=0",)}
SCARCE = 1.0  # seconds between two looks at the processes that do not compute
EVERY = 0.02


@dataclass
class Peaks:
    """Largest PSS, in bytes."""

    ranks: list[dict[str, int]] = field(default_factory=list)  # of each rank: phase -> its peak
    together: int = 0  # of both ranks at one time, after the start
    beside: int = 0  # of the run's other processes, at one time
    ray: int = 0

    @property
    def rank(self) -> int:
        """The larger rank's, once it has started."""
        return max(peak for phases in self.ranks for phase, peak in phases.items() if phase != "start")


class Watch(threading.Thread):
    """Looks at a process and all that it starts, until it ends."""

    def __init__(self, root: psutil.Process) -> None:
        super().__init__(daemon=True)
        self._root, self.peaks = root, Peaks()
        self._phases: dict[int, str] = {}  # process of a rank -> phase
        self._others: list[psutil.Process] = []

    def run(self) -> None:
        look = 0.0
        while self._root.is_running() and self._root.status() != psutil.STATUS_ZOMBIE:
            try:
                if time.monotonic() > look:
                    look = time.monotonic() + SCARCE
                    self._look_around()
                self._look()
            except (psutil.Error, OSError):  # one has ended
                look = 0.0
            time.sleep(EVERY)

    def _look_around(self) -> None:
        processes = [self._root, *self._root.children(recursive=True)]
        titles = {process: " ".join(process.cmdline()) for process in processes}
        for process, title in titles.items():
            if title.startswith(RANK) and process.pid not in self._phases:
                self._phases[process.pid] = "start"
                self.peaks.ranks.append({})
        others = [process for process in processes if process.pid not in self._phases]
        ours = [one for one in others if titles[one].startswith("ray::") and not titles[one].startswith(IDLE)]
        ours += [one for one in others if one is self._root]
        self.peaks.beside = max(self.peaks.beside, sum(pss(one.pid) for one in ours))
        self.peaks.ray = max(self.peaks.ray, sum(pss(one.pid) for one in others if one not in ours))

    def _look(self) -> None:
        together = 0
        for phases, (pid, before) in zip(self.peaks.ranks, self._phases.items(), strict=True):
            title = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
            method = title.removeprefix(RANK).lstrip(":.").partition("(")[0].strip("\0 ")
            phase = self._phases[pid] = METHODS.get(method, "start" if before == "start" else before)
            held = pss(pid)
            phases[phase] = max(phases.get(phase, 0), held)
            together += held if phase != "start" else 0
        self.peaks.together = max(self.peaks.together, together)


def pss(pid: int) -> int:
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) << 10
    return 0


def overrides_of(model: Path, engine: str, kind: str, more: Sequence[str] = ()) -> list[str]:
    where = ("backend=verl", f"trainer.ranks={RANKS}", "rollout.placement=colocated", "launch.object_store_mb=256")
    twice = "trainer.micro_batch_size=1"  # two backward passes an update, between which gradients wait
    return [f"model.path={model}", *SETTINGS, *where, twice, *ENGINES[engine], *KINDS[kind], *more]


def measure(model: Path, overrides: Sequence[str]) -> Peaks:
    with tempfile.TemporaryDirectory() as folder:
        prompts = Path(folder) / "prompts.txt"
        prompts.write_text("a red cat\n")
        given = [f"prompts={prompts}", f"run_dir={folder}/run", *overrides]
        log = Path(folder) / "log.txt"
        with log.open("wb") as out:
            command = [sys.executable, "-m", "omni_rollout.cli", "train", *given]
            run = subprocess.Popen(command, stdout=out, stderr=out, env={**os.environ, **ENVIRONMENT})
            watch = Watch(psutil.Process(run.pid))
            watch.start()
            status = run.wait()
        watch.join()
        if status != 0 or len(watch.peaks.ranks) != RANKS:
            raise RuntimeError(f"exit status {status}; the run ended with:\n{log.read_text(errors='replace')[-3000:]}")
        return watch.peaks


def derived(model: Path, overrides: Sequence[str]) -> dict[str, int]:
    """What `omni-rollout plan` says of each of the processes in each phase, in bytes, without its guess of CUDA's."""
    from omni_rollout.launch.compose import compose
    from omni_rollout.models import family_module
    from omni_rollout.plan.memory import process_parts
    from omni_rollout.plan.parts import When, phases
    from omni_rollout.plan.split import make_run

    config: TrainConfig = compose(list(overrides), unused=["prompts"])
    run = make_run(config, family_module("qwen_image", "sizes").read_sizes(str(model)), reserve=0)
    planned = phases(process_parts(run, RANKS))
    return {when.value: needed for when, needed in planned.items() if when is not When.start}


@dataclass(frozen=True, kw_only=True)
class Row:
    """In bytes."""

    engine: str
    kind: str
    weights: int  # of the transformer's files
    peaks: Peaks
    derived: dict[str, int]  # phase -> of each process


def rows(sizes: Sequence[float], engines: Sequence[str], kinds: Sequence[str], more: Sequence[str]) -> Iterator[Row]:
    """Of each engine a transformer of next to nothing, then those of about as many parameters."""
    for parameters in (0.0, *sizes):
        with tempfile.TemporaryDirectory() as folder:
            model = build(Path(folder) / "model", round(parameters / OF_BLOCK))
            weights = sum(path.stat().st_size for path in (model / "transformer").glob("*.safetensors"))
            for engine in engines:
                for kind in kinds if parameters else ["lora"]:
                    overrides = overrides_of(model, engine, kind, more)
                    peaks, planned = measure(model, overrides), derived(model, overrides)
                    yield Row(engine=engine, kind=kind, weights=weights, peaks=peaks, derived=planned)


HEAD = (
    "engine | policy | weights | rollout | update | sync | checkpoint | peak beyond the constant | the plan | off by "
    "| both ranks at once | the run's others | Ray's own"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=float, nargs="+", default=[0.17e9])
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--json", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    arguments = parser.parse_args()
    print(f"MiB, of the larger of {RANKS} ranks\n\n| {HEAD} |\n|{'---|' * (HEAD.count('|') + 1)}")
    made: list[Row] = []
    for row in rows(arguments.parameters, arguments.engines, arguments.kinds, arguments.overrides):
        made.append(row)
        constant = next(one for one in made if one.engine == row.engine)
        print(f"| {' | '.join(cells(row, constant))} |", flush=True)
        if arguments.json:
            arguments.json.write_text(json.dumps([asdict(one) for one in made], indent=2) + "\n")


def cells(row: Row, constant: Row) -> list[str]:
    peaks = [mib(max(rank.get(phase, 0) for rank in row.peaks.ranks)) for phase in ("rollout", "update", "sync", "save")]
    beside = [mib(row.peaks.together), mib(row.peaks.beside), mib(row.peaks.ray)]
    if row is constant:
        return [row.engine, "constant", mib(row.weights), *peaks, "", "", "", *beside]
    more = row.peaks.rank - constant.peaks.rank
    planned = max(row.derived.values()) - max(constant.derived.values())
    return [
        *(row.engine, row.kind, mib(row.weights), *peaks, mib(more), mib(planned), f"{planned / more - 1:+.0%}"),
        *beside,
    ]


if __name__ == "__main__":
    main()
