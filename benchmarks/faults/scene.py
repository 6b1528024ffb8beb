"""One run folder, the processes that work in it one command after another, and the faults that are planted there."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from benchmarks.faults.witness import Witness

STEPS = {"embedded": 4, "verl": 9, "colocated": 6}
TIMEOUT = {"embedded": 30, "verl": 60, "colocated": 60}  # seconds, rollout.timeout
RANKS_TIMEOUT = 90  # seconds, launch.timeout
REWARD_TIMEOUT = 15  # seconds, reward.timeout: an image takes milliseconds
PROCESSES = {
    "embedded": ("backend=embedded",),
    "verl": ("backend=verl", "rollout.workers=2", "launch.max_restarts=4"),  # three of the faults cost one
    "colocated": (
        *("backend=verl", "trainer.ranks=2", "trainer.engine=fsdp2", "rollout.placement=colocated"),
        *(f"launch.timeout={RANKS_TIMEOUT}", "launch.max_restarts=4"),
    ),
}
PER_STEP = 8  # trajectories: 2 prompts, 4 images each
AGENTS = ("ray::RuntimeEnvAgent", "ray::DashboardAgent")  # may be there a minute after their raylet was killed
LEFT_SECONDS = 60  # for the processes of a run to be gone after its end
PATIENCE = 400  # seconds for whatever is waited for: a busy machine needs several times what a quiet one does
QUIET = {
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "passive",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "WANDB_MODE": "offline",
}


@dataclass(kw_only=True)
class Strike:
    """A fault, with what was seen of it when it was planted; what came of it is read from the witness."""

    fault: str
    what: str
    time: float
    step: int  # in which it came
    logged: int  # steps whose line was written
    unfinished: int  # requests of that step that were under way, or waiting
    victim: int = 0  # its process
    broken: list[str] = field(default_factory=list)  # promises of this fault in particular that were not kept


class SceneError(RuntimeError):
    """A run did not do what the scene needs to go on."""


class Scene:
    """A context manager: whatever was started in it is dead afterwards.

    Args:
        model: a checkpoint in diffusers layout.
        backend: of STEPS: embedded, verl, or verl with colocated engines.
        more: overrides of all of its commands.
    """

    def __init__(self, folder: Path, model: Path, backend: str, *more: str) -> None:
        self.folder, self.run_dir, self.backend = folder, folder / "run", backend
        folder.mkdir(parents=True, exist_ok=True)
        self.log = folder / "log.txt"
        self.log.touch()
        self._overrides = [*_overrides(model, folder, self.run_dir, backend), *more]
        self.witness = Witness(self.run_dir, folder / "finished")
        self.strikes: list[Strike] = []
        self._process: subprocess.Popen[bytes] | None = None
        self._seen: set[psutil.Process] = set()

    def __enter__(self) -> Scene:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes():
            process.kill()
        if self._process is not None:
            self._process.wait()
        self.witness.close()

    def start(self, *more: str, program: Sequence[str] = ("-m", "omni_rollout.cli"), inside: Sequence[str] = ()) -> None:
        """Starts `omni-rollout train`; what it prints goes to the end of `log`.

        Args:
            more: overrides.
            program: what Python runs, if not the command line itself.
            inside: words before Python.
        """
        command = [*inside, sys.executable, *program, "train", *self._overrides, *more]
        environment = {**os.environ, **QUIET}
        with self.log.open("ab") as out:
            self._process = subprocess.Popen(command, stdout=out, stderr=out, start_new_session=True, env=environment)

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def processes(self, title: str = "") -> list[psutil.Process]:
        """What the run has started, and itself, alive; those whose command line begins with `title`."""
        if self._process is not None and self._process.poll() is None:
            root = psutil.Process(self._process.pid)
            self._seen |= {root, *root.children(recursive=True)}
        return [process for process in self._seen if alive(process) and title_of(process).startswith(title)]

    def until(self, condition: Callable[[], object], what: str) -> None:
        """Waits, with an eye on the run.

        Raises:
            SceneError: the run ended, or `PATIENCE` did.
        """
        end, look = time.monotonic() + PATIENCE, 0.0
        while not condition():
            now = time.monotonic()
            if now > look:
                self.processes()  # remembered, for the day that their parent dies
                look = now + 1
            if self._process is None or self._process.poll() is not None or now > end:
                raise SceneError(f"waited for {what} in vain. {self.log} ends with:\n{self.said()[-3000:]}")
            time.sleep(0.005)

    def send(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def in_rollout(self, step: int, images: int = 3) -> None:
        """Waits until that many trajectories of a step are finished."""
        self.until(lambda: len(self.witness.of_step(step)) >= images, f"{images} trajectories of step {step}")

    def after_step(self, step: int) -> None:
        self.until(lambda: self.witness.done() >= step, f"the end of step {step}")

    def strike(self, fault: str, what: str, step: int, *, unfinished: int | None = None) -> Strike:
        """To be called at the moment of the fault, right after it."""
        now = time.time()
        left = PER_STEP - sum(one.time <= now for one in self.witness.of_step(step)) if unfinished is None else unfinished
        logged = max((done for when, done in self.witness.steps if when <= now), default=0)
        self.strikes.append(Strike(fault=fault, what=what, time=now, step=step, logged=logged, unfinished=left))
        return self.strikes[-1]

    def wait(self) -> int:
        """The exit status, once everything that the run had started is gone too.

        Raises:
            SceneError: something stays.
        """
        assert self._process is not None
        end = time.monotonic() + PATIENCE
        while self._process.poll() is None:
            self.processes()
            if time.monotonic() > end:
                raise SceneError(f"the run does not end. {self.log} ends with:\n{self.said()[-3000:]}")
            time.sleep(0.2)
        self.nothing_left()
        return self._process.returncode

    def nothing_left(self) -> None:
        """Waits until all processes of a run that has ended are gone, but Ray's agents, which nothing of the run depends on."""
        _, left = psutil.wait_procs([p for p in self.processes() if not title_of(p).startswith(AGENTS)], timeout=LEFT_SECONDS)
        if left:
            raise SceneError(f"still there after the run: {', '.join(title_of(process) for process in left)}")

    def finish(self) -> None:
        """Waits for a run that must end well."""
        status = self.wait()
        if status != 0:
            raise SceneError(f"exit status {status}, expected 0. {self.log} ends with:\n{self.said()[-3000:]}")

    def must_say(self, strike: Strike, *words: str) -> None:
        strike.broken += [f"it never said: {text}" for text in words if text not in self.said()]

    def said(self) -> str:
        return self.log.read_text(errors="replace")


def alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def title_of(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""


def _overrides(model: Path, folder: Path, run_dir: Path, backend: str) -> list[str]:
    """The same for all scenes of a back end, so that one undisturbed run is what each of them must give."""
    prompts = folder / "prompts.txt"
    prompts.write_text("a red cat\na blue dog on a table\n")
    return [
        *PROCESSES[backend],
        f"model.path={model}",
        f"prompts={prompts}",
        f"run_dir={run_dir}",
        "collate.prompt_width=24",
        "sampling.height=64",
        "sampling.width=64",
        "sampling.num_inference_steps=40",  # a step must last long enough to be struck in the middle
        "sampling.sde_window_range=[0,7]",
        "sampling.true_cfg_scale=2.0",
        "reward=jpeg_compressibility",
        "rollout.prompts_per_step=2",
        f"rollout.group_size={PER_STEP // 2}",
        "rollout.max_num_seqs=2",
        f"rollout.timeout={TIMEOUT[backend]}",
        f"reward.timeout={REWARD_TIMEOUT}",
        f"trainer.steps={STEPS[backend]}",
        "trainer.schedule=constant",
        "trainer.learning_rate=1e-3",
        "trainer.ema_decay=0.9",
        "trainer.save_every=1",
        "wandb.mode=disabled",
        "threads=1",
    ]
