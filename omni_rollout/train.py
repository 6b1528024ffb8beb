"""The loop, readable top to bottom.

for step in steps:
    PromptStream.batch ─► Collator.groups ─► RolloutEngine.generate ─► rewards ─► advantages
                                                    ▲                                     │
                          update_weights (digests) ─┘◄── PolicyUpdate ◄── old log-probs ◄─┘
    Monitor.log

With rollout.ahead=1 the batch of step k + 1 is sampled before the update of step k.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from omni_rollout import monitor
from omni_rollout.config import TrainConfig
from omni_rollout.data.seeds import SeedLedger
from omni_rollout.launch.progress import Progress
from omni_rollout.monitor import CaptionedImage, Guards, Monitor
from omni_rollout.policy.learner import Learner, Which
from omni_rollout.policy.recompute import check_fingerprint, check_machine
from omni_rollout.rollout.choice import give, held_here, open_engine
from omni_rollout.run.batch import Batch, roll_out
from omni_rollout.run.checkpoints import Checkpoints, how_to_go_on
from omni_rollout.run.evaluate import sampled
from omni_rollout.run.evaluation import captioned, evaluated
from omni_rollout.run.material import Material
from omni_rollout.run.phases import Phase, Phases
from omni_rollout.run.profile import StepProfile
from omni_rollout.run.resume import behaviour_version, check_weights, enter, run_state
from omni_rollout.run.start import Start, find_start
from omni_rollout.run.stop import StopFlag
from omni_rollout.trajectories.journal import Journal
from omni_rollout.types import Trajectory


def train(config: TrainConfig, progress: Progress | None = None) -> None:
    """Runs steps up to `config.trainer.steps` in this process; everything it makes lies in `config.run_dir`.

    `progress` is told of everything that takes a while.

    SIGTERM, SIGINT and the file `stop` in the run folder end it after a step and a checkpoint, without an error.

    Raises:
        UserError: the run folder or the checkpoint to go on from does not fit.
        RunFailedError: the last checkpoint could not be written; or the engine hangs: then this process cannot end by itself.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    progress = progress or Progress(shown=False)
    start, run_dir, stop = find_start(config), Path(config.run_dir), StopFlag(config.run_dir)
    if start.run is not None and start.step >= config.trainer.steps:
        print(
            f"all {config.trainer.steps} steps are done: {start.checkpoint}; more: trainer.steps={config.trainer.steps + 10}; "
            f"to evaluate: omni-rollout evaluate checkpoint={start.checkpoint} out=FOLDER"
        )
        return
    stop.clear()
    with stop.signals():
        enter(config, start)
        wandb_id = start.run.wandb_id if start.run is not None else None
        with Monitor(run_dir, config, config.trainer.steps, wandb_id, progress) as sight:
            with Trainer(config, start, progress) as trainer:
                checkpoints = _loop(config, start, trainer, sight, stop)
            sight.summary(checkpoints.last)
    checkpoints.check()


def _loop(config: TrainConfig, start: Start, trainer: Trainer, sight: Monitor, stop: StopFlag) -> Checkpoints:
    checkpoints, profile = Checkpoints(config, trainer.journal), StepProfile(config, start.step)
    if config.evaluation.images and not start.step:
        metrics, images, notes = trainer.evaluate(0)
        sight.log(0, metrics, notes=notes, evaluation=images)
    for step in range(start.step + 1, config.trainer.steps + 1):
        stop.stepping()
        evaluation: list[CaptionedImage] = []
        with monitor.last_words(sight, step):
            with profile.watching(step, trainer.engine, trainer.learner, trainer.rewards):
                report = trainer.step(step)
            if trainer.evaluation_due(step):
                evaluated, evaluation, lost = trainer.evaluate(step)
                report.metrics |= evaluated
                report.notes |= lost
        sight.log(step, report.metrics, report.images, {**report.notes, **checkpoints.notes()}, evaluation)
        profile.tell(step, report.metrics, trainer.progress)
        stopping = stop.is_set
        if checkpoints.due(step, stopping=stopping):
            trainer.progress.stage("saving the checkpoint", quiet=True)
            checkpoints.save(step, trainer.saver(step, sight))
        else:
            checkpoints.after(step)
        if stopping and step < config.trainer.steps:
            print(f"stopped after step {step}, as asked; {how_to_go_on(config.run_dir)}", flush=True)
            break
    return checkpoints


@dataclass(kw_only=True)
class StepReport:
    """What one step has to show."""

    metrics: dict[str, float]
    images: list[CaptionedImage]
    notes: dict[str, str]


class Trainer:
    """Engine, policy and optimizer of one run, and what a step does with them."""

    def __init__(self, config: TrainConfig, start: Start, progress: Progress) -> None:
        self.config, self.progress = config, progress
        self.material = Material.of(config)
        self.rewards, self.algorithm = self.material.rewards, self.material.algorithm
        self.seeds = SeedLedger(Path(config.run_dir) / "seeds.jsonl")
        self.journal = Journal(config.run_dir, keep=config.rollout.keep_finished)
        self.guards = Guards(config.run_dir)
        self.version, self._first_version = start.step, behaviour_version(start)
        self._next: Batch | None = None  # of the step to come, sampled ahead
        self.engine = open_engine(config, progress)
        try:
            self.phases = Phases(config, self.engine)
            self.phases.enter(Phase.sync)
            progress.stage("loading the model into the trainer", quiet=True)
            self.learner = Learner(config, checkpoint=start.checkpoint, held=held_here(self.engine))
            self.phases.add(self.learner)
            self._sync()  # also proves, before the first rollout, that both sides read the same checkpoint
            check_weights(start, self.expected["weights"])
        except BaseException:
            self.engine.close()
            raise

    def __enter__(self) -> Trainer:
        return self

    def __exit__(self, *_: object) -> None:
        if self._next is not None:
            self._next.rewards.close()
        self.engine.close()

    def step(self, step: int) -> StepReport:
        """Step 1, 2, ...: one rollout, one update, one weight sync."""
        config, timings = self.config, dict[str, float]()
        with timed(timings, "step"):
            with self._timed(timings, "rollout", step):
                batch = self._batch(step)
                reused = self.seeds.record(batch.requests) + self.seeds.record_noise(batch.trajectories)
            trajectories, staleness = batch.trajectories, self.version - batch.version
            for trajectory in trajectories:
                check_fingerprint(trajectory, batch.expected)
            monitor.check_finite(step, trajectories)
            with self._timed(timings, "reward", step), batch.rewards:  # what is left of it
                scored = batch.rewards.result(trajectories)
            self.rewards.require(scored)
            images = len(trajectories)
            trajectories = [trajectories[row] for row in scored.scored]  # the others leave their groups
            scores, group_ids = scored.of(scored.scored), [trajectory.group_id for trajectory in trajectories]
            compared = torch.tensor(self.rewards.compared(scored, group_ids), dtype=torch.float32)
            advantages = self.algorithm.advantages(compared, group_ids)
            with self._timed(timings, "old_log_probs", step):
                self.phases.enter(Phase.update)
                inspection = monitor.inspect(self.learner, trajectories, config, step)
                old = self.learner.old_log_probs(trajectories, advantages, step, recomputed=inspection.recompute)
            with self._timed(timings, "update", step):
                update, rate = self.learner.step(trajectories, advantages, old, step)
            with self._timed(timings, "weight_sync", step):
                self.version = step
                self._sync()
        metrics = monitor.step_metrics(
            update,
            rewards=scores.total,
            breakdown=scores.breakdown,
            failed=images - len(trajectories),
            group_ids=group_ids,
            elements=trajectories[0].latents[0].numel(),
            padding=self.material.collator.padding(batch.requests),
            clip_range=config.trainer.clip_range,
            timings=timings,
            kept=batch.kept,
            learning_rate=rate,
            collisions=self.seeds.collisions,
            recomputed=inspection.recompute,
            staleness=staleness,
            sampled=inspection.parity,
            drift=self.learner.drift.value,
        )
        texts, media = [one.prompt.text for one in trajectories], [one.media for one in trajectories]
        shown = captioned(scores.total, texts, media)
        notes = monitor.step_notes(
            update,
            sampled_by=batch.expected["weights"],
            recomputed=inspection.recompute,
            reused=reused,
            not_kept=batch.not_kept,
            not_scored=scored.failures,
        )
        return StepReport(metrics=metrics, images=shown, notes=notes)

    @contextmanager
    def _timed(self, timings: dict[str, float], stage: str, step: int) -> Iterator[None]:
        self.progress.stage(f"step {step}/{self.config.trainer.steps}: {stage.replace('_', ' ')}", quiet=True)
        with timed(timings, stage):
            yield

    def _batch(self, step: int) -> Batch:
        """Of this step, to learn from; with rollout.ahead=1 that of the next is sampled here, too."""
        batch = self._next = self._next or self._first(step)  # until there is another: what is left here is closed at the end
        ahead = self.config.rollout.ahead and step < self.config.trainer.steps
        self._next = self._rollout(step + 1) if ahead else None
        return batch

    def _first(self, step: int) -> Batch:
        """Of a step that nothing was sampled ahead for: by the policy that would have, had the run not been stopped."""
        if self.learner.behaviour is None or self._first_version == self.version:
            return self._rollout(step)
        self.version = self._first_version
        self._sync("behaviour")
        batch = self._rollout(step)
        self.version = step - 1
        self._sync()
        return batch

    def _rollout(self, step: int) -> Batch:
        """By the policy that the engine holds now."""
        return roll_out(
            self.engine,
            self.material.requests(step),
            self.rewards,
            self.journal,
            step=step,
            version=self.version,
            expected=self.expected,
            timeout=self.config.rollout.timeout,
        )

    def saver(self, step: int, sight: Monitor) -> Callable[[Path], None]:
        """What writes the checkpoint of a step into a folder."""
        lines = {"metrics.jsonl": sight.lines, "seeds.jsonl": self.seeds.lines}
        state = run_state(self.config, step=step, weights=self.expected["weights"], wandb_id=sight.wandb_id, lines=lines)

        def save(folder: Path) -> None:
            self.phases.enter(Phase.save)
            try:
                self.learner.save(folder, state)
            finally:  # a checkpoint that cannot be written does not end a run
                self.phases.enter(Phase.rollout)

        return save

    def evaluation_due(self, step: int) -> bool:
        settings, steps = self.config.evaluation, self.config.trainer.steps
        return settings.images > 0 and (step == steps or (settings.every > 0 and step % settings.every == 0))

    def _sync(self, which: Which = "sampler") -> None:
        self.phases.enter(Phase.sync)
        digest = give(self.engine, self.learner.weights(which), self.version, lambda: self.learner.adapter(which))
        self.expected = self.learner.expected(digest)
        check_machine(self.engine.machine, self.expected)  # before anything is sampled
        self.phases.enter(Phase.rollout)

    def evaluate(self, step: int) -> tuple[dict[str, float], list[CaptionedImage], dict[str, str]]:
        """Deterministic (ode) images from fixed seeds; with an average kept, metrics of the averaged policy as well; and, as
        notes, what the guards found and what could not be scored."""
        name = f"step_{step:05d}" if step else "before"
        averages = self.learner.ema is not None and self.version > 0
        if self.learner.lags:
            self._sync("policy")
        metrics, notes, rewards, trajectories = self._evaluate(name)
        texts, media = [one.prompt.text for one in trajectories], [one.media for one in trajectories]
        guarded, lost = self.guards(step, media, texts, rewards)
        if averages:
            self._sync("average")
            averaged, *_ = self._evaluate(f"{name}-ema", "evaluating the average by")
            metrics |= {f"{key}_ema": value for key, value in averaged.items()}
        if averages or self.learner.lags:
            self._sync()
        return metrics | guarded, captioned(rewards, texts, media), notes | lost

    def _evaluate(
        self, name: str, what: str = "evaluating"
    ) -> tuple[dict[str, float], dict[str, str], list[float | None], list[Trajectory]]:
        requests = self.material.evaluation(name)
        trajectories = sampled(self.engine, requests, self.progress, self.config.rollout.timeout, what)
        self.progress.stage(f"scoring {len(trajectories)} images", quiet=True)
        media, prompts = [one.media for one in trajectories], [one.prompt for one in trajectories]
        batch = self.rewards(media, prompts)
        return *evaluated(self.rewards, media, prompts, batch), batch.total, trajectories


@contextmanager
def timed(timings: dict[str, float], stage: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    timings[stage] = time.perf_counter() - start
