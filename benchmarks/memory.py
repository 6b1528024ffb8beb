"""What one process with an engine and a trainer takes: the peak of a rollout, an update, a weight sync and a checkpoint.

    python -m benchmarks.memory --parameters 0.3e9 1e9
    python -m benchmarks.memory --parameters 0.3e9 -- trainer.lora_rank=0 trainer.offload=all rollout.offload=encoders

Each row is a process of its own over a random Qwen-Image of about that many parameters, in bf16: it takes two steps of a run
(`backend=embedded`) while its PSS (what is its own, and its share of what others map too) is read every few milliseconds. A row
with a transformer of next to nothing says what everything else takes, libraries, text encoder and VAE: the constant. The start,
where the files that are read are mapped too, is told and does not count. What is freed is given back at once (`ENVIRONMENT`).
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
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

HEADS, HEAD_DIM = 12, 128
OF_BLOCK = 36 * (HEADS * HEAD_DIM) ** 2  # parameters of a block, nearly: attention 8, modulations 12, feed-forwards 16
EVERY = 0.005  # seconds between two readings
ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": str(1 << 17)}  # its own first choice; else glibc raises it, and keeps blocks for later
SETTINGS = (
    *("model.dtype=bfloat16", "collate.prompt_width=32", "sampling.height=128", "sampling.width=128"),
    *("sampling.num_inference_steps=3", "sampling.true_cfg_scale=4", "reward=jpeg_compressibility", "rollout.group_size=2"),
    *("rollout.prompts_per_step=1", "rollout.max_num_seqs=2", "trainer.steps=2", "trainer.micro_batch_size=2"),
    *("trainer.gradient_checkpointing=true", "evaluation.images=0", "wandb.mode=disabled", "threads=1"),
)


def build(out: Path, layers: int) -> Path:
    """A random checkpoint whose transformer is in bf16, made a block at a time; 0 layers: next to nothing of one."""
    from safetensors.torch import load_file, save_file

    from omni_rollout.nano.random_weights import build_random

    heads, head_dim = (HEADS, HEAD_DIM) if layers else (2, 32)
    build_random(out, layers=max(layers, 1), heads=heads, head_dim=head_dim, joint_dim=128)
    for path in (out / "transformer").glob("*.safetensors"):
        save_file({name: tensor.bfloat16() for name, tensor in load_file(path).items()}, path, metadata={"format": "pt"})
    return out


class Watch:
    """The largest PSS of this process, in bytes, of each phase that `phase` names."""

    def __init__(self) -> None:
        self.peaks: dict[str, int] = {}
        self.now = "start"
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def _look(self) -> None:
        while True:
            held, phase = pss(), self.now
            self.peaks[phase] = max(self.peaks.get(phase, 0), held)
            time.sleep(EVERY)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        before, self.now = self.now, name
        try:
            yield
        finally:
            self.now = before


def pss() -> int:
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) << 10
    raise RuntimeError("/proc/self/smaps_rollup has no Pss")


def measure(model: Path, overrides: Sequence[str]) -> tuple[dict[str, int], float]:
    """In this process: the peak of each phase over two steps and a checkpoint; seconds of the second step."""
    watch = Watch()
    from omni_rollout.launch.compose import compose
    from omni_rollout.launch.progress import Progress
    from omni_rollout.policy.state import RunState
    from omni_rollout.run.phases import Phase
    from omni_rollout.run.start import find_start
    from omni_rollout.train import Trainer

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "run").mkdir()
        prompts = Path(folder) / "prompts.txt"
        prompts.write_text("a red cat\n")
        given = (f"model.path={model}", f"prompts={prompts}", f"run_dir={folder}/run", *SETTINGS, *overrides)
        config = compose(list(given))
        with Trainer(config, find_start(config), Progress(shown=False)) as trainer:
            for name in ("generate", "update_weights"):
                watched(watch, trainer.engine, name)
            watched(watch, trainer.learner, "step")
            seconds = 0.0
            for step in (1, 2):
                with watch.phase("other"):
                    seconds = trainer.step(step).metrics["timing_s/step"]
            trainer.phases.enter(Phase.save)
            with watch.phase("save"):
                trainer.learner.save(Path(folder) / "saved", RunState(step=2, weights=""))
    return watch.peaks, seconds


def watched(watch: Watch, owner: object, name: str) -> None:
    original = getattr(owner, name)

    def call(*args: object, **kwargs: object) -> object:
        with watch.phase(name):
            result = original(*args, **kwargs)
            return list(result) if name == "generate" else result

    setattr(owner, name, call)


def in_a_process(model: Path, overrides: Sequence[str]) -> tuple[dict[str, int], float]:
    """`measure` in a fresh process."""
    code = "import json, sys; from pathlib import Path; from benchmarks.memory import measure; "
    code += "print(json.dumps(measure(Path(sys.argv[1]), sys.argv[2:])))"
    command, environment = [sys.executable, "-c", code, str(model), *overrides], {**os.environ, **ENVIRONMENT}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def derived(model: Path, overrides: Sequence[str]) -> int:
    """What `omni-rollout plan` says of one process with it once it has started, in bytes, without its guess of CUDA's."""
    from omni_rollout.launch.compose import compose
    from omni_rollout.models import family_module
    from omni_rollout.plan.memory import process_parts
    from omni_rollout.plan.parts import When
    from omni_rollout.plan.parts import phases as phases_of
    from omni_rollout.plan.split import make_run

    config = compose([f"model.path={model}", *SETTINGS, *overrides], unused=["prompts"])
    run = make_run(config, family_module("qwen_image", "sizes").read_sizes(str(model)), reserve=0)
    return max(needed for when, needed in phases_of(process_parts(run)).items() if when is not When.start)


@dataclass(frozen=True, kw_only=True)
class Row:
    """In bytes."""

    weights: int  # of the transformer's files
    phases: dict[str, int]  # peak of each
    seconds: float  # of a step, while it is watched
    derived: int

    @property
    def peak(self) -> int:
        return max(peak for phase, peak in self.phases.items() if phase != "start")


def rows(sizes: Sequence[float], overrides: Sequence[str]) -> Iterator[Row]:
    """Of a transformer of next to nothing, then of those of about as many parameters."""
    for parameters in (0, *sizes):
        with tempfile.TemporaryDirectory() as folder:
            model = build(Path(folder) / "model", round(parameters / OF_BLOCK))
            weights = sum(path.stat().st_size for path in (model / "transformer").glob("*.safetensors"))
            peaks, seconds = in_a_process(model, overrides)
            yield Row(weights=weights, phases=peaks, seconds=seconds, derived=derived(model, overrides))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=float, nargs="+", default=[0.3e9, 1e9])
    parser.add_argument("--json", type=Path)
    parser.add_argument("overrides", nargs="*", default=["trainer.lora_rank=32"])
    arguments = parser.parse_args()
    print(" ".join(arguments.overrides))
    first, *others = made = list(rows(arguments.parameters, arguments.overrides))
    print(f"constant {mib(first.peak - first.weights)}: {phases(first)}")
    for one in others:
        more = one.peak - first.peak
        print(
            f"{mib(one.weights)} of weights: peak {mib(one.peak)} = "
            f"{more / (one.weights - first.weights):.2f} x weights + constant; "
            f"the plan says {mib(one.derived - first.derived)} more than the constant's row, it was {mib(more)}: {phases(one)}"
            f"; a step took {one.seconds:.1f} s"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(one) for one in made], indent=2) + "\n")


def mib(number: int) -> str:
    return f"{number / 2**20:.0f} MiB"


def phases(row: Row) -> str:
    return ", ".join(f"{name} {mib(peak)}" for name, peak in row.phases.items())


if __name__ == "__main__":
    main()
