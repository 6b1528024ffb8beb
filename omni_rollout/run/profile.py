"""Where the time of one step goes: a trace by torch's profiler and a table by stage, in the run folder.

Nothing of a run is changed for it: methods are wrapped as the step begins, and are themselves again when it ends.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from torch._C._profiler import _ExperimentalConfig
from torch.profiler import ProfilerActivity, profile, record_function

from omni_rollout.config import TrainConfig
from omni_rollout.launch.progress import Progress
from omni_rollout.policy.learner import Learner
from omni_rollout.rewards.base.sum import WeightedSum
from omni_rollout.rollout.choice import Engine
from omni_rollout.rollout.engine import RolloutEngine

FOLDER = "profile"
ENGINE_STAGES = {  # method of the pipeline -> what it is called
    "encoded": "encode",
    "call": "transformer",
    "denoise_step": "around the transformer",
    "step_scheduler": "SDE",
    "decode_beside_the_loop": "decode",
}
BESIDE = ("decode", "scoring")  # in threads of their own, while the engine's goes on
INSIDE = {  # stage that the loop times -> what is found inside
    "rollout": ("encode", "transformer", "around the transformer", "SDE", *BESIDE),
    "old_log_probs": ("forward without gradients",),
    "update": ("forward", "backward", "optimizer"),
}
HEAD = "| stage | seconds | of the step | calls | ms a call |\n|---|---|---|---|---|"


@dataclass
class Spent:
    seconds: float = 0.0  # without what other stages inside took
    calls: int = 0


class Stages:
    """Time by stage, over all threads."""

    def __init__(self) -> None:
        self.spent: dict[str, Spent] = {}
        self._open = threading.local()  # seconds of finished inner stages, for each open one of this thread
        self._lock = threading.Lock()

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        inner: list[float] = self._open.__dict__.setdefault("inner", [])
        inner.append(0.0)
        start = time.perf_counter()
        try:
            with record_function(stage):
                yield
        finally:
            taken = time.perf_counter() - start
            own = taken - inner.pop()
            if inner:
                inner[-1] += taken
            with self._lock:
                spent = self.spent.setdefault(stage, Spent())
                spent.seconds += own
                spent.calls += 1

    @contextmanager
    def of(self, owner: Any, method: str, stage: str | Callable[[], str]) -> Iterator[None]:
        """Inside, calls of the object's method are counted as `stage`, or as what that returns at the time of the call."""
        original, had = getattr(owner, method), method in vars(owner)

        @wraps(original)
        def counted(*args: Any, **kwargs: Any) -> Any:
            with self.timed(stage if isinstance(stage, str) else stage()):
                return original(*args, **kwargs)

        setattr(owner, method, counted)
        try:
            yield
        finally:
            if had:
                setattr(owner, method, original)
            else:
                delattr(owner, method)

    @contextmanager
    def of_engine(self, engine: RolloutEngine) -> Iterator[None]:
        """Inside, what it does counts as ENGINE_STAGES."""
        with ExitStack() as wrapped:
            for method, stage in ENGINE_STAGES.items():
                wrapped.enter_context(self.of(engine.pipeline, method, stage))
            yield


class StepProfile:
    """Of one step of a run, when `config.profile` asks for it.

    Args:
        done: steps that had been taken before the run started or went on; the chosen one is counted from there, and is the last
            where the run ends before.
    """

    def __init__(self, config: TrainConfig, done: int) -> None:
        self.step = min(done + config.profile_step, config.trainer.steps) if config.profile else None
        self._folder = Path(config.run_dir) / FOLDER
        self._stages, self._failure = Stages(), ""

    @contextmanager
    def watching(self, step: int, engine: Engine, learner: Learner, rewards: WeightedSum) -> Iterator[None]:
        """Around the step. An engine of another process shows as a wait."""
        if step != self.step:
            yield
            return
        with ExitStack() as wrapped, profile(activities=_activities(), experimental_config=_all_threads()) as trace:
            if isinstance(engine, RolloutEngine):
                wrapped.enter_context(self._stages.of_engine(engine))
            wrapped.enter_context(self._stages.of(type(rewards), "__call__", "scoring"))  # Python looks for it in the class
            wrapped.enter_context(self._stages.of(learner.engine.module, "forward", _forward))
            wrapped.enter_context(self._stages.of(learner.engine, "backward", "backward"))
            wrapped.enter_context(self._stages.of(learner.engine, "step", "optimizer"))
            yield
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            trace.export_chrome_trace(str(self._path(".trace.json.gz")))
        except OSError as error:  # a run is worth more than its profile
            self._failure = str(error)

    def tell(self, step: int, metrics: Mapping[str, float], progress: Progress) -> None:
        """After the step, with its metrics: writes the table, and shows it."""
        if step != self.step:
            return
        text = table(self._stages.spent, metrics)
        try:
            if not self._failure:
                self._path(".md").write_text(f"{text}\n", encoding="utf-8")
        except OSError as error:
            self._failure = str(error)
        where = f"not written: {self._failure}" if self._failure else f"{self._path('.trace.json.gz')}, for ui.perfetto.dev"
        progress.result(f"profile of step {step}, made under torch's profiler; its trace: {where}\n{text}")

    def _path(self, suffix: str) -> Path:
        return self._folder / f"step_{self.step:05d}{suffix}"


def table(spent: Mapping[str, Spent], metrics: Mapping[str, float]) -> str:
    """Stages of the loop, which add up to the step; below each what was found inside it.

    Inside the rollout threads work side by side, so those lines may add up to more than it; what is left of it is what the
    engine's own thread has not accounted for.
    """
    step, lines = metrics["timing_s/step"], [HEAD]
    whole = {key.removeprefix("timing_s/"): value for key, value in metrics.items() if key.startswith("timing_s/")}
    del whole["step"]
    for stage, seconds in {**whole, "the rest": step - sum(whole.values())}.items():
        lines.append(f"| **{stage.replace('_', ' ')}** | {seconds:.3f} | {seconds / step:.1%} | | |")
        inside = [name for name in INSIDE.get(stage, ()) if name in spent]
        for name in inside:
            own, calls = spent[name].seconds, spent[name].calls
            lines.append(f"| {name} | {own:.3f} | {own / step:.1%} | {calls} | {1000 * own / calls:.2f} |")
        if inside:
            rest = seconds - sum(spent[name].seconds for name in inside if name not in BESIDE)
            lines.append(f"| what is left of it | {rest:.3f} | {rest / step:.1%} | | |")
    lines.append(f"| **step** | {step:.3f} | 100.0% | | |")
    return "\n".join(lines)


def _forward() -> str:
    return "forward" if torch.is_grad_enabled() else "forward without gradients"


def _activities() -> list[ProfilerActivity]:
    return [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]


def _all_threads() -> _ExperimentalConfig:
    """The engine has one of its own, which torch's profiler leaves out unless told; no event is read here."""
    return _ExperimentalConfig(profile_all_threads=True, trace_only=True)
